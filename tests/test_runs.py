"""Runs on request: trained once, keyed by what they use, whoever trains them."""

import ast
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict, field, make_dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_params
from joblib.externals.loky import get_reusable_executor

from weightsum_lib import run
from weightsum_lib.study import params, pool, runs, store
from weightsum_lib.study.config import RunConfig, pick_device, pick_precision
from weightsum_lib.study.params import Method, Params, ParamsError
from weightsum_lib.study.runs import Study, run_content


@pytest.fixture
def lines(capfd, monkeypatch):
    """The progress lines that a study has said so far."""
    monkeypatch.delenv(pool.PROGRESS_VARIABLE, raising=False)
    get_reusable_executor().shutdown(wait=True)  # workers of an earlier test write elsewhere
    said = []

    def lines():
        said.extend(line for line in capfd.readouterr().err.splitlines() if line.startswith("run "))
        return said

    return lines


def test_a_run_is_trained_once_and_then_read(tiny, lines):
    first = Study(tiny)
    config = first.config("joint ce", "mnist", "cifar10")
    trained = first.run(config)
    assert len(lines()) == tiny.epochs
    assert "run 1/1 mnist+cifar10 joint, third ce, seed 0 | epoch 1/2" in lines()[0]
    assert lines()[-1].endswith("0.0 min left")
    again = Study(tiny).run(config)
    assert len(lines()) == tiny.epochs
    for a, b in zip(trained.networks["support"].parameters(), again.networks["support"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.history == trained.history and not again.networks["main"].training
    made = store.read_json(first.folder(config) / "run.json")["made_with"]
    assert made["torch"] == torch.__version__.split("+")[0] and made["commit"] == first.commit


DIGESTS = {"mnist": "a", "cifar10": "b"}


def run_key(*content):
    return store.content_key(run_content(*content))


def configs():
    """A run of each kind that there is."""
    random = Method("joint", "ce", symmetric=True, keys="random", network_width=0.25, permuted_support=0.8)
    for method in (Method(), Method("joint", "ce"), replace(random, quiet=1.0), Method("sequential")):
        yield RunConfig(method, "mnist", "" if method.protocol == "independent" else "cifar10")
    yield RunConfig(Method("joint", "distill"), "mnist", "cifar10", arch="vgg16")


def keys():
    store._parsed.cache_clear(), store.reached.cache_clear()
    return [run_key(config, DIGESTS, "cpu") for config in configs()]


@pytest.fixture
def edited(monkeypatch):
    """A function that gives the runs' keys after an edit of a module's source."""
    sources = dict(store._SOURCES)
    monkeypatch.setattr(store, "_SOURCES", sources)
    before = keys()

    def edit(module, old, new):
        text = sources[module]
        assert old in text
        sources[module] = text.replace(old, new, 1)
        ast.parse(sources[module])
        after = keys()
        sources[module] = text
        return [a == b for a, b in zip(before, after, strict=True)]

    yield edit
    monkeypatch.undo()
    keys()


ADDED = {
    "an architecture": ("core.models", "\ndef vgg16(", "\nclass Wide(nn.Module):\n    depth = 3\n\n\ndef vgg16("),
    "a residual network": (
        "core.models",
        "\ndef vgg16(",
        "\ndef resnet99(width=1.0):\n    return VGG(9)\n\n\ndef vgg16(",
    ),
    "a reading": ("core.losses", "\ndef none(", "\ndef hinge(*z):\n    return 0\n\n\ndef none("),
    "a merger": ("core.merging", "\ndef ", "\ndef ties(networks):\n    return networks[0]\n\n\ndef "),
    "a dataset": ("study.params", 'DATASETS = {"mnist"', 'DATASETS = {"kmnist": "KMNIST", "mnist"'),
    "a measurement": ("study.measure", "\ndef ", "\ndef flatness(study):\n    return 0\n\n\ndef "),
    "a switch": (
        "study.params",
        "    equal_norms: bool",
        '    loud: float = _switch(0.0, "loud")\n    equal_norms: bool',
    ),
    "a switch's code": (
        "study.train",
        "\ndef term_quiet(",
        "\ndef term_loud(step):\n    return 0\n\n\ndef term_quiet(",
    ),
    "a knob": ("study.config", "    epochs: int = 1\n", "    epochs: int = 1\n    patience: int = 0\n"),
    "a docstring": ("study.train", '"""SGD with', '"""Plain SGD with'),
    "a comment": ("study.train", "_MAX_GRADIENT = 5.0  # L2", "_MAX_GRADIENT = 5.0  # the L2"),
    "an annotation": ("study.train", "progress: float) -> float:", "progress: int) -> int:"),
    "a line that is stored": ("study.store", "chmod(0o644)", "chmod(0o640)"),
}


def test_the_work_of_a_run_is_counted_in_the_width_of_its_networks():
    alone, random = RunConfig(Method(), "mnist", epochs=1), Method("joint", "ce", keys="random", network_width=0.25)
    assert runs.work(replace(alone, epochs=3)) == 3 * runs.work(alone)
    assert 3.5 < runs.work(alone) / runs.work(replace(alone, width=0.5)) < 4.1  # convolutions: the square
    pair = runs.work(replace(alone, method=Method("joint", "ce"), support="cifar10"))
    assert pair == 3 * runs.work(alone)
    keyed, narrow = replace(alone, method=random, support="cifar10"), replace(alone, width=0.25)
    wide = replace(alone, width=0.5)  # two networks of a quarter, wherever they lie
    assert runs.work(keyed) == 2 * runs.work(narrow) + runs.work(wide)
    quiet = replace(keyed, method=replace(random, quiet=1.0, symmetric=True))
    assert runs.work(quiet) == 4 * runs.work(narrow) + 2 * runs.work(wide)


@pytest.mark.parametrize("what", ADDED)
def test_what_a_run_does_not_use_changes_no_key(edited, what):
    assert all(edited(*ADDED[what]))


@pytest.mark.parametrize(
    ("module", "old", "new", "same"),
    [
        ("study.train", "_MAX_GRADIENT = 5.0", "_MAX_GRADIENT = 4.0", [False] * 5),
        ("study.train", "_uniformity(by_support) +", "2 * _uniformity(by_support) +", [True, True, False, True, True]),
        ("core.losses", '"batchmean"', '"sum"', [True, True, True, True, False]),
        ("core.models", "_HIDDEN = 4096", "_HIDDEN = 4095", [False] * 5),
        ("core.batchnorm", "mean = values.mean(0)", "mean = 2 * values.mean(0)", [False] * 5),
    ],
)
def test_an_edit_changes_the_keys_of_the_runs_that_use_it_and_no_others(edited, module, old, new, same):
    assert edited(module, old, new) == same


def test_a_switch_or_a_default_that_a_run_reads_is_in_its_key():
    """Also at its default: should the default be changed, the key would follow."""
    (_, pair, *_), read = configs(), []
    read.append(run_content(pair, DIGESTS, "cpu"))
    method, config = read[-1]["method"], read[-1]["config"]
    assert method["symmetric"] is False and method["third"] == "ce" and "seeds" not in method and "quiet" not in method
    assert config["batch_size"] == 128 and config["precision"] == "float32"
    new = make_dataclass("New", [("loud", float, field(default=0.0))], bases=(Method,), frozen=True)
    read.append(run_content(replace(pair, method=new(**asdict(pair.method))), DIGESTS, "cpu"))
    assert read[-1]["method"] == method


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 64}, {"precision": "bfloat16"}, {"main": "svhn"}])
def test_the_key_depends_on_the_configuration(change):
    for config in configs():
        assert run_key(config, DIGESTS, "cpu") != run_key(replace(config, **change), DIGESTS, "cpu")


def test_the_key_depends_on_data_device_and_versions(monkeypatch):
    config = RunConfig(Method(), "mnist")
    key = run_key(config, DIGESTS, "cpu")
    assert run_key(config, {"mnist": "c"}, "cpu") != key and run_key(config, DIGESTS, "cuda") != key
    monkeypatch.setattr(runs, "version", lambda name: "2.99.1")
    other = run_key(config, DIGESTS, "cpu")
    monkeypatch.setattr(runs, "version", lambda name: "2.99.7")
    assert run_key(config, DIGESTS, "cpu") == other != key  # the minor version, not the patch


def test_damaged_weights_are_not_used(tiny):
    study = Study(tiny)
    configs = [study.config("independent", name) for name in ("mnist", "svhn")]
    study.train_all(configs)
    mnist, svhn = (study.folder(c) / "networks.safetensors" for c in configs)
    whole = mnist.read_bytes()
    for broken in (whole[:-1], whole[:-5] + b"\x01" + whole[-4:], b"", svhn.read_bytes()):
        mnist.write_bytes(broken)
        with pytest.raises(RuntimeError, match=r"networks.safetensors is damaged, missing or another run's; delete"):
            Study(tiny).run(configs[0])


def test_a_checkpoint_or_a_run_that_cannot_be_read_counts_as_absent(tiny, lines):
    study = Study(tiny)
    config = study.config("independent", "mnist")
    wanted = study.run(config)
    folder = study.folder(config)
    (folder / "checkpoint.safetensors").write_bytes(b"")
    (folder / "run.json").write_text("")
    (folder / ".run.json.killed").write_text("{")
    again = Study(tiny).run(config)
    assert len(lines()) == 2 * tiny.epochs  # it was trained again, from its first epoch
    for p, q in zip(wanted.networks["main"].parameters(), again.networks["main"].parameters(), strict=True):
        assert torch.equal(p, q)
    assert sorted(path.name for path in folder.iterdir()) == ["networks.safetensors", "run.json"]


def test_fine_tuning_from_the_sum_trains_its_parents_first(tiny, lines):
    study = Study(tiny)
    study.run(study.config("sequential", "mnist", "cifar10", start="sum"))
    said = [line.split(" | ")[0].split(" ", 2)[2] for line in lines()]
    assert list(dict.fromkeys(said)) == [
        "mnist independent, seed 0",
        "cifar10 independent, seed 0",
        "mnist sequential from sum, seed 0",
    ]


def test_networks_trained_at_once_are_those_trained_one_by_one(tmp_path, lines, monkeypatch):
    """Whatever the number of networks and of threads, and every one of them says a line an epoch."""
    made = []
    monkeypatch.setattr(runs, "_MOST_AT_ONCE", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for at_once, threads in ((0, 1), (1, 2)):
        study = Study(tiny_params(tmp_path / str(at_once), networks_at_once=at_once))
        configs = [
            study.config("sequential", "mnist", "cifar10", start="sum"),
            study.config("sequential", "mnist", "cifar10", start="main"),
            replace(study.config("random keys", "mnist", "cifar10"), epochs=6),
        ]
        torch.set_num_threads(threads)
        try:
            study.train_all(configs)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        made.append([study.run(config).networks for config in configs])
    said = lines()
    assert len(said) == 2 * (2 * 2 + 6 + 2 * 1)  # two parents of two epochs and a pair of six, two fine-tunings of one
    at = {what: [i for i, line in enumerate(said[:12]) if f" {what}" in line] for what in ("mnist ind", "cifar10 ind")}
    at |= {what: [i for i, line in enumerate(said[:12]) if what in line] for what in ("from sum", "from ma", "random")}
    assert all(said[i].startswith("run 1/5 ") for i in at["random"])  # the longest is the first
    assert max(at["mnist ind"] + at["cifar10 ind"]) < at["from sum"][0] and max(at["mnist ind"]) < at["from ma"][0]
    assert at["from ma"][0] < max(at["random"])  # it doesn't wait for what is no parent of it
    assert {line.split(" ")[1] for line in said[:12]} == {f"{i}/5" for i in range(1, 6)}
    assert said[11].endswith("0.0 min left")
    for a, b in zip(*made, strict=True):
        for role in a:
            for p, q in zip(a[role].state_dict().values(), b[role].state_dict().values(), strict=True):
                assert torch.equal(p, q)


def test_what_goes_wrong_in_a_worker_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    study = Study(tiny_params(tmp_path, networks_at_once=2, learning_rate=99.0))
    configs = [study.config("independent", name) for name in ("mnist", "cifar10")]
    with pytest.raises(FloatingPointError, match=r"independent.* not finite in epoch 1, step \d .*; lower learning"):
        study.train_all([replace(c, learning_rate=1e30) for c in configs])
    monkeypatch.setattr(store, "code_digest", lambda *roots: "edited since")
    with pytest.raises(RuntimeError, match="was edited while it ran"):
        study.train_all(configs)
    assert not list(study.results.glob("runs/*/run.json"))


def test_who_waits_for_another_process_says_for_whom_and_for_how_long(tmp_path):
    path, said = tmp_path / "training.lock", []

    def wait():
        with store.alone(path, said.append):
            pass

    thread = threading.Thread(target=wait)
    with store.alone(path):
        thread.start()
        while thread.is_alive() and not said:
            time.sleep(0.01)
        holder = rf"another process \(process {os.getpid()}, since \d\d:\d\d:\d\d\) holds training.lock; waiting"
        assert re.match(holder, said[0])
    thread.join(10)
    assert not thread.is_alive() and re.match(r"training.lock: waited \d+ s", said[1])
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


def test_progress_goes_to_the_terminal_after_what_the_runner_puts_before_it(capfd, monkeypatch):
    monkeypatch.delenv(pool.PROGRESS_VARIABLE, raising=False)
    pool.report_progress("a line")
    monkeypatch.setenv(pool.PROGRESS_VARIABLE, "  a notebook: ")
    pool.report_progress("a line")
    assert capfd.readouterr().err == "a line\n  a notebook: a line\n"


def test_the_time_left_is_that_of_what_is_left_also_where_a_run_was_resumed(tmp_path, monkeypatch):
    """Two runs of ten epochs, of which the first goes on after its fifth; a minute a unit of work."""
    said, done = [], tmp_path / "done"
    monkeypatch.setattr(pool, "report_progress", said.append)
    for number, epoch, minutes in (("1/2", 6, 1), ("2/2", 1, 2), ("1/2", 7, 3)):
        monkeypatch.setattr(pool.time, "time", lambda minutes=minutes: 60.0 * minutes)
        about = {"run": f"run {number} of it", "epochs": 10, "work": 1.0}
        pool.say_epoch(20.0, str(done), 0.0, about, {"epoch": epoch, "seconds": 60.0})
    assert [line.rpartition("about ")[2] for line in said] == ["14.0 min left", "13.0 min left", "12.0 min left"]
    done.write_text('["run 1/2 of it", ')  # another process has not written all of its line
    pool.say_epoch(20.0, str(done), 0.0, about, {"epoch": 8, "seconds": 60.0})
    assert said[-1].endswith("about 36.0 min left")


@pytest.mark.parametrize(
    "asked, gib, on_cpu, on_gpu, pages, width",
    [
        (0, 64, 4, 1, 2, 1.0),
        (0, 8, 2, 1, 1, 1.0),
        (0, 64, 4, 1, 2, 0.5),
        (0, 16, 4, 1, 2, 0.5),
        (0, 6, 2, 1, 1, 0.5),
        (0, 4, 1, 1, 1, 0.25),
        (0, 1, 1, 1, 1, 0.5),
        (1, 7, 1, 1, 1, 0.5),
        (3, 64, 3, 3, 2, 0.5),
        (3, 4, 3, 3, 1, 0.5),
        (99, 64, 8, 8, 2, 0.5),
    ],
)
def test_how_many_networks_are_trained_at_once(tmp_path, monkeypatch, asked, gib, on_cpu, on_gpu, pages, width):
    monkeypatch.setattr(runs.joblib, "cpu_count", lambda: 8)
    monkeypatch.setattr(pool, "memory", lambda: gib << 30)
    study, found = Study(tiny_params(tmp_path, networks_at_once=asked, width=width)), []
    for kind in ("cpu", "cuda"):
        study.device = torch.device(kind)
        found.append((study.at_once(), study.notebooks_at_once()))
    assert found == [(on_cpu, pages), (on_gpu, 1)]
    study.device, study.cluster = torch.device("cpu"), "local:4"
    assert study.notebooks_at_once() == 1


@pytest.mark.parametrize("gib, networks", [(7, 1), (8, 2), (64, 4)])
def test_networks_that_are_narrower_than_their_profile_are_reckoned_as_what_they_are(monkeypatch, gib, networks):
    monkeypatch.setattr(runs.joblib, "cpu_count", lambda: 8)
    monkeypatch.setattr(pool, "memory", lambda: gib << 30)
    p = params.read("residual", {"device": "cpu"})
    assert p.width == 4 * max(m.network_width * p.width for m in p.methods.values())
    assert Study(p).at_once() == networks


def test_a_sum_of_many_networks_has_room_where_it_is_measured(tiny, monkeypatch):
    study, found = Study(replace(tiny, width=0.5, networks_at_once=0)), []
    monkeypatch.setattr(runs.joblib, "cpu_count", lambda: 8)
    monkeypatch.setattr(pool, "memory", lambda: 24 << 30)
    monkeypatch.setattr(Study, "_workers", lambda study, jobs, networks=2: found.append(networks) or 1 / 0)
    assert [study.at_once(n) for n in (1, 2, 4, 8)] == [4, 4, 4, 2]
    pair = [study.config("independent", name) for name in ("mnist", "svhn")]
    monkeypatch.setattr(study, "train_all", lambda configs: None)
    monkeypatch.setattr(study, "content_of", lambda measurement: {"networks": len(measurement.configs)})
    wanted = [runs.Measurement(abs, configs, {"data": []}) for configs in (pair, pair * 4)]
    with pytest.raises(ZeroDivisionError):
        study.measured(wanted)
    assert found == [8]


@pytest.mark.parametrize(
    ("file", "says", "found"),
    [
        ("none", "", 5000),
        ("memory.max", "1000\n", 1000),
        ("memory.max", "max\n", 5000),
        ("memory/memory.limit_in_bytes", "1000\n", 1000),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", 5000),
    ],
)
def test_memory_is_that_of_the_machine_or_less_where_a_container_has_less(monkeypatch, file, says, found):
    def read_text(path):
        if str(path) != f"/sys/fs/cgroup/{file}":
            raise FileNotFoundError(path)
        return says

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(pool.psutil, "virtual_memory", lambda: SimpleNamespace(total=5000))
    assert pool.memory() == found


def test_a_worker_that_has_grown_is_replaced_without_a_word():
    def grow(number):
        sys.held = getattr(sys, "held", b"") + bytes(150_000_000)
        time.sleep(0.6)
        return number, os.getpid()

    with warnings.catch_warnings(record=True) as said, pool.opened(2) as workers:
        warnings.simplefilter("always", append=True)
        found = [value for _, value in workers.each(range(16), lambda n: (str(n), partial(grow, n), 0))]
    assert sorted(number for number, _ in found) == list(range(16)) and not said
    assert len({worker for _, worker in found}) > 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_before_training(tiny):
    with pytest.raises(ParamsError, match=r"no GPU here. Use PROFILE=quick, or DEVICE=cpu"):
        Study(Params(**{**vars(tiny), "device": "cuda"}))
    assert pick_device("auto") == torch.device("cpu")


def test_bfloat16_only_where_the_processor_is_faster_with_it(monkeypatch):
    cpu = torch.device("cpu")
    for has in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": True, "amx_bf16": has})
        assert pick_precision(cpu) == ("bfloat16" if has else "float32")
    for name, faster in (("Intel Xeon", "float32"), ("AMD EPYC 9B45", "bfloat16")):  # without AMX
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"avx512_bf16": True, "cpu_name": name})
        assert pick_precision(cpu) == faster
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert pick_precision(cpu) == "float32"


def test_what_code_reads_from_a_file_of_the_package_is_in_its_digest(monkeypatch):
    root = "study.synthetic:synthesize"
    before, train = store.code_digest(root), store.code_digest("study.train:train")
    monkeypatch.setattr(store, "_DATA", {"strokes.json": "[]"})
    store.reached.cache_clear()
    assert store.code_digest(root) != before and store.code_digest("study.train:train") == train
    store.reached.cache_clear()


def test_the_hours_of_a_run_are_its_steps_times_a_measured_one(tiny):
    study = Study(tiny)
    config = study.config("joint ce", "mnist", "cifar10")
    hours = study.hours(config)
    assert hours > 0 and study.hours(replace(config, seed=3, main="svhn")) == hours  # measured once
    assert study.hours(replace(config, epochs=10)) == pytest.approx(5 * hours)
    fine_tuned = study.config("sequential", "mnist", "cifar10", start="sum")
    alone = study.alone(fine_tuned)
    assert study.hours(fine_tuned) * alone.epochs == pytest.approx(study.hours(alone) * fine_tuned.finetune_epochs)


def test_a_row_may_be_trained_longer_and_is_that_run(tiny):
    study = Study(replace(tiny, rows=tiny.rows | {"longer": replace(tiny.method("joint ce"), longer=3)}))
    once, longer = (study.config(row, "mnist", "cifar10") for row in ("joint ce", "longer"))
    assert longer == replace(once, epochs=3 * once.epochs)


def test_a_precision_that_the_processor_has_not_is_refused_and_float32_is_always_there(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    with pytest.raises(ParamsError, match="'bfloat16' is asked for, which this processor does not multiply"):
        pick_precision(cpu, "bfloat16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert [pick_precision(cpu, wanted) for wanted in ("bfloat16", "float32")] == ["bfloat16", "float32"]


def test_nothing_is_trained_before_the_claims_are_committed_and_a_plan_trains_nothing(
    tiny, tmp_path, monkeypatch, capsys
):
    claims = tmp_path / "claims.yaml"
    claims.write_text("{}")
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "claims"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(params, "CLAIMS", claims)
    claims.write_text("{changed: {}}")
    with pytest.raises(run.RunError, match=r"claims.yaml has changes: .* committed before it is trained"):
        run.train(tiny, only_plan=False)
    monkeypatch.setattr(Study, "hours", lambda self, config: 0.5)
    run.train(tiny, only_plan=True)
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0].split()[:3] == ["1", "0.50", "h"] and f"{len(said) - 1} of {len(said) - 1} runs are missing" in said[-1]
    )
    assert not list(tmp_path.glob("results/runs/*/run.json"))


def _workers(of):
    """The processes of this user that train for a process, by their number."""
    found = subprocess.run(["ps", "-wweo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()
    return [
        int(line.split()[0]) for line in found if "loky" in line and "Process-" in line and int(line.split()[1]) == of
    ]


def _alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="not Linux")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_who_is_told_to_stop_stops_at_once_with_its_workers_and_goes_on_later(tmp_path, how):
    program = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background ignore
os.sched_getaffinity = lambda _: {0, 1}
from weightsum_lib import run
from weightsum_lib.study import params, plan
values = {"results_dir": sys.argv[1], "device": "cpu", "networks_at_once": 2, "epochs": 400}
plan.queue = lambda study: [study.config("independent", name) for name in ("mnist", "cifar10")]
read = params.read
run.params.read = lambda profile, overrides=None: read(profile, values)
sys.exit(run.main(["train", "--profile", "smoke"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop(pool.PROGRESS_VARIABLE, None)
    trains = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE, text=True, env=environment
    )
    workers = []
    try:
        said = trains.stderr.readline()
        assert said.startswith("run "), said
        workers = _workers(trains.pid)
        assert len(workers) == 2
        trains.send_signal(how)
        started = time.monotonic()
        trains.wait(20)
        assert time.monotonic() - started < 5
        rest = trains.stderr.read() if how != signal.SIGKILL else ""
        if how != signal.SIGKILL:
            assert (
                trains.returncode == 130 and "goes on from the last finished epoch" in rest and "Traceback" not in rest
            )
    finally:
        for process in (trains.pid, *workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert list(tmp_path.glob("runs/*/checkpoint.safetensors")) and not list(tmp_path.glob("runs/*/run.json"))
