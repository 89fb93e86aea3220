import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def locked(name):
    """The pinned requirements of one package, one a marker."""
    normal = re.sub(r"[-_.]+", "-", name).lower()
    lines = [line for line in LOCK.splitlines() if re.match(rf"{re.escape(normal)}==", line)]
    return [Requirement(line) for line in lines]


def test_the_lock_pins_what_pyproject_asks_for():
    wanted = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    for requirement in map(Requirement, wanted):
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
    asked = {Requirement(r).name: str(Requirement(r).specifier) for r in PROJECT["dependencies"]}
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
