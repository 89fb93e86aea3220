import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: other processes may compute meanwhile

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from weightsum_lib import run
from weightsum_lib.study import params
from weightsum_lib.study.data import Dataset


def pytest_collection_modifyitems(items):
    """The longest file first, beside which all others are tested."""
    items.sort(key=lambda item: item.path.name != "test_run.py")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Nothing traces a test with the mark ``no_cover``; in a worker of xdist pytest-cov alone would go on to."""
    trace = sys.gettrace()
    if pyfuncitem.get_closest_marker("no_cover"):
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(trace)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)


def tiny_params(folder, **changes):
    """The smoke profile, smaller still, with results in a folder of the test's own."""
    small = {"width": 1 / 16, "train_images": 120, "test_images": 40, "calibration_images": 32, "epoch_images": 96}
    small |= {"batch_size": 32, "results_dir": str(folder), "device": "cpu"}
    return params.read("smoke", small | changes)


@pytest.fixture
def tiny(tmp_path):
    return tiny_params(tmp_path / "results")


@pytest.fixture(scope="session")
def datasets():
    """Two learnable toy tasks by dataset name: the class is the brightness of a patch."""
    generator = torch.Generator().manual_seed(0)

    def make(name, channel):
        splits = {}
        for split, n in (("train", 96), ("val", 20), ("test", 40)):
            labels = torch.arange(n) % 10
            x = torch.randint(0, 60, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
            x[:, channel, 8:24, 8:24] = (labels * 25).to(torch.uint8).view(-1, 1, 1)
            splits |= {f"{split}_images": x, f"{split}_labels": labels}
        return Dataset(name=name, source="stand-in", note="toy", checksum=name, **splits)

    return {"mnist": make("mnist", 0), "cifar10": make("cifar10", 1)}


ROOT = Path(__file__).parent.parent
SMOKE = ["--profile", "smoke", "--device", "cpu"]


class House:
    """A copy of the repository, run with this interpreter."""

    def __init__(self, path: Path, environment: dict):
        self.path, self.results, self.html = path, path / "results" / "smoke", path / "book" / "_build" / "html"
        self.environment = {**os.environ, "PYTHONPATH": str(path), **environment}
        self.environment.pop("PYTEST_CURRENT_TEST", None)  # with it no kernel looks at its own standard error

    def run(self, *arguments):
        return self.python("-m", "weightsum_lib.run", *arguments)

    def python(self, *arguments, **environment):
        command, environment = [sys.executable, *map(str, arguments)], self.environment | environment
        return subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True)

    def notebook(self, name):
        return nbformat.read(self.results / f"{name}.ipynb", as_version=4)

    def write(self, file, old, new):
        """Put something else into a file; returns what was in it."""
        text = (self.path / file).read_text(encoding="utf-8")
        assert old in text
        (self.path / file).write_text(text.replace(old, new, 1), encoding="utf-8")
        return text

    @contextlib.contextmanager
    def edited(self, file, old, new):
        """A file with something else in it, for a while."""
        text = self.write(file, old, new)
        try:
            yield
        finally:
            (self.path / file).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository on a machine that has another ``python3`` kernel in every place it may look."""
    top = tmp_path_factory.mktemp("house")
    path = top / "copy"
    for name in ("book", "notebooks", "weightsum_lib", "params"):
        ignore = shutil.ignore_patterns("_build", "published", "__pycache__", "*.ipynb", ".*")
        shutil.copytree(ROOT / name, path / name, ignore=ignore)
    (path / "book" / "published").mkdir()
    for name in run.standing(top):  # the pages on speed, size and those of one profile need them
        shutil.copyfile(ROOT / "book" / "published" / name, path / "book" / "published" / name)
    foreign = top / "foreign" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    places = {"JUPYTER_PATH": str(top / "foreign"), "JUPYTER_DATA_DIR": str(top / "foreign")}
    return House(path, places)
