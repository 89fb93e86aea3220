"""Broken for real: killed, cut off, out of room, fed damage. Nothing is lost, and nothing that is not whole is used.

What is marked ``hard`` breaks it many times over (``make test-hard``); beside it a sample.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightsum_lib import run
from weightsum_lib.study import pool, runs, store, train
from weightsum_lib.study.runs import Study

ROOT = Path(__file__).parent.parent
LEFT = re.compile(r"\.[0-9a-f]{8}\..*")  # what a killed process may leave

# A study of four runs in a folder. What is killed is the process itself, by itself, at the moment that is named.
PROGRAM = """
import os, pathlib, resource, signal, sys
folder, moment, at_once, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
os.sched_getaffinity = lambda _: {0, 1}
from weightsum_lib import run
from weightsum_lib.study import params, plan, runs
write, replace = pathlib.Path.write_bytes, os.replace

def die(path, *words):
    if all(word in str(path) for word in words):
        os.kill(os.getpid(), signal.SIGSTOP if moment.startswith("stop") else signal.SIGKILL)

def write_bytes(path, content):
    kind, _, file = moment.partition(" ")
    if kind in ("half", "stop") and file in path.name:
        write(path, content[: len(content) // 2])
        die(path)
    return write(path, content)

def replaced(old, new):
    die(new, moment.removeprefix("before ")) if moment.startswith("before ") else None
    replace(old, new)
    die(new, moment.removeprefix("after ")) if moment.startswith("after ") else None

pathlib.Path.write_bytes, os.replace = write_bytes, replaced
small = {"width": 1 / 16, "train_images": 120, "test_images": 40, "calibration_images": 32, "epoch_images": 96}
small |= {"batch_size": 32, "epochs": 4, "results_dir": folder, "device": "cpu", "networks_at_once": at_once}
read = params.read
run.params.read = lambda profile, overrides=None: read(profile, small)
plan.queue = lambda study: [
    study.config("independent", "mnist"), study.config("sequential", "mnist", "cifar10", start="sum"),
    study.config("random keys", "mnist", "cifar10")]
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(run.main(["train", "--profile", "smoke"]))
"""


def study(folder, moment="never", at_once=1, limit=0):
    """A process that trains the study, in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(pool.PROGRESS_VARIABLE, None)
    command = [sys.executable, "-c", PROGRAM, str(folder), moment, str(at_once), str(limit)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment, **pipes)


def made(folder):
    """What a study has made: the tensors of each run, and its history without what took how long."""
    found = {}
    for path in sorted(Path(folder).glob("runs/*/run.json")):
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in store.read_sealed(path)["history"]]
        found[path.parent.name] = store.read_tensors(path.with_name("networks.safetensors"))[0], rows
    return found


def assert_same(one, other):
    assert one.keys() == other.keys() and len(one) == 4
    for name, (tensors, rows) in one.items():
        assert rows == other[name][1] and tensors.keys() == other[name][0].keys()
        assert all(torch.equal(tensor, other[name][0][key]) for key, tensor in tensors.items())


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """The folder of a study that was left in peace."""
    folder = tmp_path_factory.mktemp("peace")
    process = study(folder)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return folder


def go_on(folder, never_killed, at_once=1):
    """Let a study that was killed end, and hold it to the one that was not."""
    process = study(folder, at_once=at_once)
    said = process.communicate()[1]
    assert process.returncode == 0 and "Traceback" not in said, said
    assert_same(made(folder), made(never_killed))
    names = [path.name for path in Path(folder).rglob("*") if path.is_file()]
    assert not [name for name in names if LEFT.fullmatch(name) or "checkpoint" in name]
    return said


def killed(folder, moment, at_once=1):
    """Kill it at a moment that it does itself, or after a time in seconds from its first epoch on."""
    timed = not moment.strip("0123456789.")
    process = study(folder, "never" if timed else moment, at_once)
    if timed:
        said = process.stderr.readline()
        time.sleep(float(moment))
        os.kill(process.pid, signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said


MOMENTS = ["half checkpoint", "before checkpoint", "after checkpoint", "half networks", "half run.json"]
MOMENTS += ["before run.json", "after run.json"]


def test_a_study_that_is_killed_again_and_again_ends_as_if_it_never_was(tmp_path, never_killed):
    for moment in ("half checkpoint", "after run.json"):
        killed(tmp_path, moment)
    said = go_on(tmp_path, never_killed)
    epochs = 2 * 4 + 1 + 4  # two parents, a fine-tuning, a pair
    assert 0 < said.count("| epoch") < epochs  # it went on from what was there


@pytest.mark.hard
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_study_survives_ten_kills_and_more(tmp_path, never_killed, at_once):
    draw = random.Random(at_once)
    moments = MOMENTS if at_once == 1 else []
    moments = moments + [f"{draw.uniform(0, 2):.2f}" for _ in range(12 - len(moments))]
    draw.shuffle(moments)
    survived = 0
    for moment in moments:
        with contextlib.suppress(AssertionError):  # it had ended before
            killed(tmp_path, moment, at_once)
            survived += 1
        if len(made(tmp_path)) == 4:
            go_on(tmp_path, never_killed, at_once)
            shutil.rmtree(tmp_path / "runs")
    print(f"\n{survived} kills survived, networks at once: {at_once}")
    assert survived >= 10
    go_on(tmp_path, never_killed, at_once)


def test_two_that_ask_for_one_run_train_it_once_and_the_dead_block_nobody(tmp_path, never_killed):
    first = study(tmp_path, "stop run.json")  # it stands still, with the lock
    assert "| epoch" in first.stderr.readline()
    second = study(tmp_path)
    waits = second.stderr.readline()
    assert f"another process (process {first.pid}, since " in waits and "waiting until it has ended" in waits
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    said = second.communicate()[1]
    assert second.returncode == 0, said
    assert "training.lock: waited" in said
    assert_same(made(tmp_path), made(never_killed))


def test_a_file_that_finds_no_room_is_named_with_what_it_needed_and_nothing_half_is_kept(tmp_path):
    process = study(tmp_path, limit=300_000)
    said = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in said, said
    last = said.splitlines()[-1]
    assert re.search(r"error: .*/[\w/.-]+.safetensors can't be written: File too large \([\d,]+ bytes were nee", last)
    assert all(store.read_tensors(path) for path in tmp_path.rglob("*.safetensors"))
    assert not [path for path in tmp_path.rglob(".*") if LEFT.fullmatch(path.name)]


@contextlib.contextmanager
def mounted(folder, options):
    """A small disk of its own; skips where that may not be made."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.hard
def test_a_full_disk_and_one_that_is_only_read_stop_it_with_a_message(tmp_path, never_killed):
    with mounted(tmp_path / "disk", "size=2m") as disk:
        process = study(disk)
        said = process.communicate()[1]
        assert process.returncode == 2 and "Traceback" not in said, said
        assert f"error: {disk}/" in said and "No space left on device" in said and "Make room" in said
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        go_on(disk, never_killed)
        shutil.rmtree(disk / "runs")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        process = study(disk)
        said = process.communicate()[1]
        assert process.returncode == 2 and "Traceback" not in said and "Read-only file system" in said, said
        assert str(disk) in said


# Damage to files. Each kind of file is held to one rule: what is damaged is refused by name or counts as absent;
# what is used is what was written.

JSON_OF_ANOTHER_TYPE = [b"[]", b"{}", b"null", b"1", b'"text"', b"{", b"\xff\xfe", b"NaN", b'[{"seal": ""}]']


def damaged(whole, other, how, where, bit):
    """The bytes of a file, damaged: ``where`` from 0 to 1."""
    at = int(where * (len(whole) - 1))
    match how:
        case "cut":
            return whole[:at]
        case "one bit":
            return whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
        case "another's":
            return other
        case "empty":
            return b""
        case "another type":
            return JSON_OF_ANOTHER_TYPE[bit % len(JSON_OF_ANOTHER_TYPE)]


def rewritten(path, how, number):
    """Tensors that are whole, and wrong: what a program with a fault might have written."""
    tensors, about = store.read_tensors(path)
    name = sorted(tensors)[number % len(tensors)]
    match how:
        case "shape":
            tensors[name] = torch.cat([tensors[name].flatten(), torch.zeros(1, dtype=tensors[name].dtype)])
        case "type":
            tensors[name] = tensors[name].to(torch.float64 if tensors[name].is_floating_point() else torch.int32)
        case "not finite":
            floats = [name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point()]
            tensors[floats[number % len(floats)]].view(-1)[0] = (float("nan"), float("inf"))[number % 2]
        case "missing":
            del tensors[name]
    store.write_tensors(path, tensors, about)


BYTES, TENSORS = ["cut", "one bit", "another's", "empty", "another type"], ["shape", "type", "not finite", "missing"]
KINDS = ["networks", "checkpoint", "run", "measurement", "notebook", "results", "stamp"]
CASES = [(kind, how) for kind in KINDS for how in BYTES + TENSORS * (kind in ("networks", "checkpoint"))]


class Files:
    """Two runs, two measurements and two executed notebooks; and of each kind of file what uses it."""

    def __init__(self, folder):
        self.folder, self.params = folder, tiny_params(folder, epochs=1)
        study = self.study = Study(self.params)
        self.configs = [study.config("independent", name) for name in ("mnist", "svhn")]
        for config in self.configs:
            study.train_here(config)
        self.networks, self.checkpoint, self.run = (
            [study.folder(config) / name for config in self.configs]
            for name in ("networks.safetensors", "checkpoint.safetensors", "run.json")
        )
        for config, path in zip(self.configs, self.checkpoint, strict=True):
            train.train(config, {config.main: study.dataset(config.main)}, checkpoint=path)
        self.trained = {name: torch.zeros_like(t) for name, t in store.read_tensors(self.checkpoint[0])[0].items()}
        self.measurement = [folder / "measurements" / f"{name}.json" for name in ("a" * 16, "b" * 16)]
        for number, path in enumerate(self.measurement):
            store.write_sealed(path, {"key": {"what": "it"}, "value": [number, 0.1], "seconds": 1.0})
        self.smoke = folder / "smoke"
        for name in run.notebook_names():
            store.write_json(self.smoke / f"{name}.ipynb", {"cells": [name], "nbformat": 4})
            store.write_json(self.smoke / f"{name}.json", {"values": {"number": 98.2, "name": name}})
            kept = {"stamp": run._stamp(name, self.params), "made": run._digests(*run._made(name, self.smoke))}
            store.write_json(self.smoke / f"{name}.stamp.json", kept)
        pairs = [run.notebook_names()[1:3]] * 3
        self.notebook, self.results, self.stamp = (
            [self.smoke / f"{name}.{suffix}" for name in names]
            for names, suffix in zip(pairs, ("ipynb", "json", "stamp.json"), strict=True)
        )

    def use(self, kind):
        """What a study would take from the first file of a kind, in a form that can be compared; None: refused."""
        study, config = Study(self.params), self.configs[0]
        study._datasets = self.study._datasets
        match kind:
            case "networks":
                try:
                    found = study._load(config).networks["main"].state_dict()
                except RuntimeError as error:
                    assert "networks.safetensors is damaged, missing or another run's; delete" in str(error)
                    return None
                return {name: tensor.tolist() for name, tensor in found.items()}
            case "checkpoint":
                state = {name: tensor.clone() for name, tensor in self.trained.items()}
                history = train._restore(self.checkpoint[0], state)
                assert history or not any(tensor.any() for tensor in state.values())  # nothing of it is taken
                return [history, {name: tensor.tolist() for name, tensor in state.items()}] if history else None
            case "run":
                return None if study.is_missing(config) else store.read_sealed(self.run[0])
            case "measurement":
                return store.read_sealed(self.measurement[0])
        fresh = run._is_fresh(self.notebook[0].stem, self.params, self.smoke)
        if not fresh:
            with pytest.raises(run.RunError, match=r"is not as it was made; make it again: make all PROFILE=smoke"):
                run.build_book(self.smoke)
        return [store.read_json(path) for path in (self.notebook[0], self.results[0])] if fresh else None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("files"))


def damage(files, kind, how, examples):
    """Damage a file of a kind so many times; returns how often it was refused, and how often it was what it had been."""
    path, other = getattr(files, kind)
    whole, wanted, seen = path.read_bytes(), files.use(kind), []
    assert wanted is not None

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(where=st.floats(0, 1), bit=st.integers(0, 7), number=st.integers(0, 99))
    def case(where, bit, number):
        try:
            if how in BYTES:
                path.write_bytes(damaged(whole, other.read_bytes(), how, where, bit))
            else:
                rewritten(path, how, number)
            found = files.use(kind)
            seen.append(found is None)
            assert found is None or found == wanted
            # nothing but a bit that says nothing, in the padding of a header or between two words, may be overlooked
            assert found is None or how == "one bit", (kind, how)
        finally:
            path.write_bytes(whole)

    case()
    assert files.use(kind) == wanted
    assert sum(seen) >= 0.8 * len(seen)
    return sum(seen), len(seen) - sum(seen)


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_damage_is_refused_by_name_or_made_again(files, kind, how):
    damage(files, kind, how, 2)


@pytest.mark.hard
def test_damage_by_the_hundred(files):
    counts = {(kind, how): damage(files, kind, how, 14) for kind, how in CASES}
    refused, harmless = (sum(count) for count in zip(*counts.values(), strict=True))
    print(f"\n{refused} damaged files refused or made again, {harmless} with a bit that says nothing")
    assert refused + harmless >= 500 or all(sum(count) >= 1 for count in counts.values())


def test_a_measurement_that_is_damaged_is_measured_again(files):
    path = files.measurement[0]
    whole = path.read_text()
    path.write_text(whole.replace("0.1", "0.7"))
    assert store.read_sealed(path) is None
    path.write_text(whole)
    assert store.read_sealed(path)["value"] == [0, 0.1]


def test_the_memory_of_a_study_does_not_grow_with_its_runs(files, monkeypatch):
    """As many networks as were to be loaded would take five times what may be kept."""
    study = files.study
    size = runs._bytes_of(study._load(files.configs[0]))
    monkeypatch.setattr(runs, "_LOADED", 4 * size)
    config = files.configs[0]
    tensors = store.read_tensors(files.networks[0])[0]
    for seed in range(100, 120):
        folder = study.folder(replace(config, seed=seed))
        store.write_tensors(folder / "networks.safetensors", tensors, folder.name)
        store.write_sealed(folder / "run.json", {"history": []})
        study._load(replace(config, seed=seed))
        assert sum(map(runs._bytes_of, study._loaded.values())) <= 4 * size
    assert len(study._loaded) == 4


def test_a_temporary_file_of_a_dead_process_is_swept_away_and_nothing_else(tmp_path):
    names = [".0123abcd.run.json", ".gitignore", "run.json", ".0123abcd.young.json", ".keep.run.json"]
    for name in names:
        (tmp_path / name).touch()
        if "young" not in name:
            os.utime(tmp_path / name, (1, 1))
    store.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
