import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
LOCK = (ROOT / "requirements.lock").read_text()


def locked(name):
    """The pinned requirements of one package, one a marker."""
    normal = re.sub(r"[-_.]+", "-", name).lower()
    lines = [line for line in LOCK.splitlines() if re.match(rf"{re.escape(normal)}==", line)]
    return [Requirement(line) for line in lines]


def test_the_lock_pins_what_pyproject_asks_for():
    for requirement in map(Requirement, ASKED):
        pins = locked(requirement.name)
        assert pins, f"{requirement.name} is not in requirements.lock: make lock"
        for pin in pins:
            (spec,) = pin.specifier
            assert requirement.specifier.contains(Version(spec.version)), (
                f"{requirement} is not met by {pin}: make lock"
            )


def test_the_pins_that_the_study_was_made_with():
    assert [str(r) for r in locked("torch")] == ["torch==2.15.0"]
    assert [str(r) for r in locked("torchvision")] == ["torchvision==0.29.2"]
    asked = {r.name: str(r.specifier) for r in map(Requirement, ASKED)}
    assert asked["torch"] == ">=2.11" and set(asked["jupyter-book"].split(",")) == {">=1.0.4.post1", "<2"}


def test_the_lock_is_for_all_systems_and_names_no_address():
    markers = [Marker(line.split(" ; ", 1)[1]) for line in LOCK.splitlines() if " ; " in line]
    for system in ("linux", "darwin", "win32"):
        assert any(system in str(marker) for marker in markers), system
    assert "://" not in LOCK and "--index" not in LOCK and "--find-links" not in LOCK


def test_conda_gives_the_same_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    (python,) = [Requirement(c.replace("=", "==", 1)) for c in conda if c.startswith("python=")]
    (spec,) = python.specifier
    assert Version(spec.version) in Requirement("python" + PROJECT["requires-python"]).specifier


def test_the_core_needs_torch_alone():
    """In a Python that has nothing else of what the study, the book and the tests need."""
    assert [Requirement(r).name for r in PROJECT["dependencies"]] == ["torch"]
    modules = {"pyyaml": "yaml", "pillow": "PIL"}
    names = {Requirement(r).name.lower() for extra in PROJECT["optional-dependencies"].values() for r in extra}
    program = f"""
import sys
sys.modules |= dict.fromkeys({sorted(modules.get(name, name.replace("-", "_")) for name in names - {"setuptools"})})
import torch
from weightsum_lib import EXPORTS, WeightSum, average, recalibrate, vgg8
import weightsum_lib
for name, module in EXPORTS.items():
    assert not module.startswith("core.") or getattr(weightsum_lib, name)
pair, x = [vgg8(width=1 / 16), vgg8(width=1 / 16)], torch.randn(4, 3, 32, 32)
assert recalibrate(WeightSum(pair), x)(x).shape == average(pair)(x).shape == (4, 10)
try:
    weightsum_lib.synthesize("mnist", 1, "test")
except ImportError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "numpy" in said.stdout  # the study does not go without


def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "weightsum_lib", tmp_path / "weightsum_lib", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        kept = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))))
    files = [p for p in (ROOT / "weightsum_lib").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert kept == {p.relative_to(ROOT).as_posix() for p in files}
    asked = [Requirement(r) for r in metadata.get_all("Requires-Dist")]
    assert [r.name for r in asked if r.marker is None] == ["torch"]
    assert {*metadata.get_all("Provides-Extra")} == {*PROJECT["optional-dependencies"]} >= {"study", "book", "test"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_make_installs_the_lock_by_uv_where_it_is_there_else_by_pip(tmp_path, installer):
    """With stand-ins for uv and Python that say how they were called."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    for path in ("env/bin/python", "tools/uv") if installer == "uv" else ("env/bin/python",):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f'#!/bin/sh\necho "{Path(path).name} $*" >> called\n')
        (tmp_path / path).chmod(0o755)
    for tool in ("sh", "cat", "cksum", "cut", "rm", "touch", "awk"):
        (tmp_path / "tools" / tool).symlink_to(shutil.which(tool))
    command = [shutil.which("make"), "lab", "VENV=env"]
    subprocess.run(command, cwd=tmp_path, env={"PATH": str(tmp_path / "tools")}, check=True, capture_output=True)
    first, second, *_, last = (tmp_path / "called").read_text().splitlines()
    way = "uv pip install --python env/bin/python" if installer == "uv" else "python -m pip install"
    assert first.startswith(way) and first.endswith("-r requirements.lock")
    assert second.startswith(way) and second.endswith("--no-deps -e .")
    assert last == "python -m jupyterlab notebooks/00_how_to_sum.ipynb"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_deletes_nothing_that_it_did_not_make_and_runs_no_value_as_a_program(tmp_path):
    """With a stand-in for Python that says how it was called."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    refused = subprocess.run(["make", "setup", "VENV=mine"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode and "mine is there, and is no environment" in refused.stderr
    assert (tmp_path / "mine" / "kept").exists()
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "<%s>\\n" "$@" > called\n')
    python.chmod(0o755)
    for value in ("$$(touch oops)", "`touch oops`", "a folder", "it's; touch oops"):
        subprocess.run(["make", "all", "VENV=env", f"DATA_DIR={value}"], cwd=tmp_path, check=True, capture_output=True)
        called = (tmp_path / "called").read_text().splitlines()
        assert called[called.index("<--data-dir>") + 1] == f"<{value.replace('$$', '$')}>"
        assert not (tmp_path / "oops").exists()
