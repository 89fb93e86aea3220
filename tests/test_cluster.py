"""Runs on a Dask cluster: the same networks as here, whatever worker takes them, dies or differs."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_params

from weightsum_lib import scale
from weightsum_lib.study import measure, plan, pool, runs, store
from weightsum_lib.study.measure import Case, Member
from weightsum_lib.study.params import ParamsError
from weightsum_lib.study.runs import Study
from weightsum_lib.study.sums import OWN, alone

distributed, dask = map(pytest.importorskip, ("distributed", "dask"))
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster():
    """Two workers of one thread each."""
    client = pool._client("local:2")
    client.wait_for_workers(2)
    yield client
    pool._client.cache_clear()
    client.close()
    client.cluster.close()


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that gives a study on the cluster, or without one."""

    def make(address="local:2", folder="results", **changes):
        monkeypatch.setenv(pool.CLUSTER_VARIABLE, address)
        return Study(tiny_params(tmp_path / folder, **changes))

    return make


def configs(study):
    return [
        study.config("sequential", "mnist", "cifar10", start="sum"),
        study.config("random keys", "mnist", "cifar10"),
        study.config("independent", "svhn"),
    ]


def states(study, wanted):
    networks = [network for config in wanted for network in study.run(config).networks.values()]
    return [tensor for network in networks for tensor in network.state_dict().values()]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What one process trains and measures."""
    assert not os.environ.get(pool.CLUSTER_VARIABLE)
    study = Study(tiny_params(tmp_path_factory.mktemp("here")))
    return states(study, configs(study)), accuracies(study)


def accuracies(study):
    cases = [Case("1", "", 0, "", alone(Member(c)), OWN, (c.main, "cifar10")) for c in configs(study)]
    return measure.frame(study, cases)["accuracy"].tolist()


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(pool, "report_progress", said.append)
    return lambda: [line for line in said if line.startswith("run ")]


def test_a_cluster_trains_and_measures_the_same_to_the_bit_and_says_a_line_an_epoch(
    cluster, study, here, lines, monkeypatch
):
    far = study()
    with monkeypatch.context() as patch:  # none of it is done in this process
        patch.setattr(Study, "train_here", None)
        patch.setattr(measure, "made", None)
        measured = accuracies(far)
        far.train_all(configs(far))
    said = lines()
    assert len(said) == 2 * 2 + 1 + 2 * 2 and said[-1].endswith("about 0.0 min left")
    of_parents = [i for i, line in enumerate(said) if "mnist independent" in line or "cifar10 independent" in line]
    assert len(of_parents) == 4 and max(of_parents) < ["from sum" in line for line in said].index(True)
    networks, values = here
    assert measured == values
    for p, q in zip(states(far, configs(far)), networks, strict=True):
        assert torch.equal(p, q)


def after(condition, then, seconds=60):
    """Do something as soon as a condition holds, in a thread of its own."""

    def watch():
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        then()

    threading.Thread(target=watch, daemon=True).start()


def test_a_worker_that_is_killed_costs_no_more_than_its_epoch(cluster, study, lines):
    far = study(epochs=12)
    wanted = [far.config("independent", name) for name in ("mnist", "svhn")]

    def kill():
        pids = cluster.run(os.getpid)
        busy = next(address for address, keys in cluster.processing().items() if far.folder(wanted[0]).name in keys)
        os.kill(pids[busy], signal.SIGKILL)

    after(lambda: any("mnist independent" in line and "epoch 3/" in line for line in lines()), kill)
    far.train_all(wanted)
    for name in ("mnist", "svhn"):
        epochs = [line.split("epoch ")[1].split("/")[0] for line in lines() if f"{name} independent" in line]
        assert epochs == [str(i) for i in range(1, 13)], name  # none twice
    near = study("", "near", epochs=12)
    for p, q in zip(states(far, wanted), states(near, wanted), strict=True):
        assert torch.equal(p, q)


def test_what_workers_gain_is_measured_beside_this_process(cluster, monkeypatch, tmp_path):
    ways = {way: about for way, about in scale.WAYS.items() if about in ((1, ""), (2, "local:2"))}
    monkeypatch.setattr(scale, "WAYS", ways)
    small = {"width": 1 / 16, "train_images": 120, "test_images": 40, "calibration_images": 32, "epoch_images": 64}
    frame = scale.gained(5, **small, epochs=1)
    assert frame.iloc[:, 0].tolist() == list(ways) and frame["× this process"][0] == "1.00"
    assert (frame["Overhead of a job (ms)"].astype(float) > 0).all()
    assert not cluster.futures
    program = tmp_path / "memory.py"  # in a process of its own, where no memory is free that others have left
    program.write_text("from weightsum_lib import scale\nif __name__ == '__main__':\n    print(scale.memory(500))\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert 1 < float(done.stdout) < 100, done.stderr  # KiB; a process with torch in it has a million


def test_the_hours_on_n_workers_lie_between_their_bounds(tiny):
    study = Study(tiny)
    work, chain = scale.chains(study)
    queue = study.with_parents(plan.queue(study))
    parents = [p for c in queue for p in study.parents(c)]
    assert len(queue) == len(set(queue)) and set(parents) <= set(queue)
    assert work == sum(map(runs.work, queue)) and max(map(runs.work, queue)) <= chain < work
    frame = scale.on([1, 4, 1000], 100.0, 10.0).set_index("Workers")
    assert frame.loc["1"].tolist() == ["100.0", "100.0", "1.0"]
    assert frame.loc["4"].tolist() == ["25.0", "32.5", "3.1"] and frame.loc["1000"].tolist() == ["10.0", "10.1", "9.9"]


def test_jobs_in_threads_of_one_process_are_refused(study):
    with distributed.Client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as client:
        far = study(client.scheduler.address)
        with pytest.raises(RuntimeError, match=r"does 2 jobs at once in one process; start it with --nthreads 1"):
            far.run(far.config("independent", "mnist"))
    pool._client.cache_clear()


def where():
    time.sleep(0.05)
    return distributed.get_worker().name


def test_what_wants_a_gpu_is_done_by_workers_that_have_one(study, monkeypatch):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(pool, "opened", lambda *arguments: asked.append(arguments) or contextlib.nullcontext(pool.Pool()))
        for kind in ("cpu", "cuda"):
            far = study()
            far.device = torch.device(kind)
            with far._workers(7):
                pass
    assert [resources for *_, resources in asked] == [None, {"GPU": 1}]
    worker = {"cls": distributed.Worker, "options": {"nthreads": 1}}
    with_gpu = {"cls": distributed.Worker, "options": {"nthreads": 1, "resources": {"GPU": 1}}}
    scheduler = {"cls": distributed.Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": ":0"}}
    with distributed.SpecCluster(workers={"a": worker, "b": with_gpu, "c": with_gpu}, scheduler=scheduler) as cluster:
        with pool.opened(1, cluster.scheduler_address, asked[1][-1]) as workers:
            done = [workers.submit(f"job {n}", where, 0) for n in range(8)]
            assert {future.result(60) for future in done} == {"b", "c"}  # or it waits for ever
        pool._client(cluster.scheduler_address).close()
    pool._client.cache_clear()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """A scheduler, and a function that starts a worker beside it, with the code of another folder."""
    folder, started = tmp_path_factory.mktemp("machines"), []

    def dask(*arguments, code=ROOT):
        path = os.pathsep.join([str(code), *sys.path])  # before an installed one
        environment = {**os.environ, "PYTHONPATH": path}
        environment.pop(pool.CLUSTER_VARIABLE, None)
        command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(folder / "scheduler.json")]
        started.append(subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.DEVNULL))
        return started[-1]

    def worker(code=ROOT):
        return dask("worker", "--nthreads", "1", "--no-dashboard", "--local-directory", str(folder), code=code)

    scheduler = dask("scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1")
    while not (address := (store.read_json(folder / "scheduler.json") or {}).get("address")):
        time.sleep(0.1)
    yield address, scheduler, worker
    pool._client.cache_clear()
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A copy of the code in another place, as on a machine that shares no folder."""
    top = tmp_path_factory.mktemp("elsewhere")
    for name in ("weightsum_lib", "params"):
        shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    return top


def stop(process, address):
    process.terminate()
    process.wait(20)
    while pool._client(address).scheduler_info()["workers"]:
        time.sleep(0.1)


def test_where_no_folder_is_shared_runs_come_by_the_wire(machines, elsewhere, study, here, monkeypatch, tmp_path):
    address, _, worker = machines
    process = worker(elsewhere)
    monkeypatch.setattr(store, "ROOT", tmp_path)
    far = study(address, results_dir="results")
    assert far.results == tmp_path / "results"
    with monkeypatch.context() as patch:
        patch.setattr(Study, "train_here", None)
        far.train_all(configs(far)[1:])
        first = {path.name for path in elsewhere.glob("results/runs/*")}
        assert len(first) == 2 == len([*far.results.glob("runs/*/run.json")])
        shutil.rmtree(elsewhere / "results" / "runs")
        far.train_all(far.parents(configs(far)[0]))
        shutil.rmtree(elsewhere / "results" / "runs")  # the parents travel too
        far.train_all(configs(far))
    networks, values = here
    assert accuracies(far) == values  # here, since the networks are
    for p, q in zip(states(far, configs(far)), networks, strict=True):
        assert torch.equal(p, q)
    stop(process, address)


def test_a_worker_of_other_code_is_refused_by_name_before_it_trains(machines, elsewhere, study):
    address, _, worker = machines
    train = elsewhere / "weightsum_lib" / "study" / "train.py"
    text = train.read_text(encoding="utf-8")
    assert "_MAX_GRADIENT = 5.0" in text
    train.write_text(text.replace("_MAX_GRADIENT = 5.0", "_MAX_GRADIENT = 4.0"), encoding="utf-8")
    process, far = worker(elsewhere), study(address)
    with pytest.raises(RuntimeError, match=rf"the worker {os.uname().nodename}, process \d+, has other code than"):
        far.run(far.config("independent", "mnist"))
    assert not [*far.results.glob("runs/*")]
    stop(process, address)


def test_without_its_scheduler_a_study_ends_and_the_next_goes_on(machines, study, lines):
    address, scheduler, worker = machines
    process, far = worker(), study(address, epochs=400)
    wanted = far.config("independent", "mnist")
    after(lambda: len(lines()) > 1, scheduler.kill)
    with pytest.raises(RuntimeError, match=rf"the scheduler of CLUSTER={address} was lost; what was finished is kept"):
        far.run(wanted)
    process.kill()
    few = dask.config.set({"distributed.comm.timeouts.connect": "3s"})  # else half a minute
    with few, pytest.raises(ParamsError, match=r"no scheduler answers"):
        study("tcp://127.0.0.1:9").run(wanted)
    checkpoint = next(far.results.glob("runs/*/checkpoint.safetensors"))
    history = store.read_tensors(checkpoint)[1]
    assert len(history) >= 2
    more = []

    class EnoughError(Exception):
        pass

    def on_epoch(row):
        more.append(row["epoch"])
        raise EnoughError

    with pytest.raises(EnoughError):
        study("").train_here(wanted, on_epoch)
    assert more[0] > len(history)
