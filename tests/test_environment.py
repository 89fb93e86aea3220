import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
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


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def clone(folder):
    """A place for make, without the study: what is installed is a package of one line."""
    for name in ("Makefile", "install.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "requirements.lock").touch()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "tiny"\nversion = "1"\n[tool.setuptools]\npackages = []\n'
    )
    return folder


def make(folder, *arguments, **environment):
    # not those of the make around this, as they are or typed behind it
    fixed = {"CONDA_DEFAULT_ENV": "", "PYTHON": sys.executable, "VENV": "", "MAKEFLAGS": ""}
    # uv would ask a stand-in for Python who it is
    fixed["PATH"] = os.pathsep.join(d for d in os.environ["PATH"].split(os.pathsep) if not shutil.which("uv", path=d))
    environment = {k: v for k, v in (os.environ | fixed | environment).items() if v}
    command = ["make", *arguments]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **out)


def stand_in(python, said="<%s>"):
    """A stand-in for an environment's Python that keeps how it was called."""
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nprintf "{said}\\n" "$@" >> called\n')
    python.chmod(0o755)
    return python


@needs_make
def test_make_deletes_nothing_that_it_did_not_make_and_runs_no_value_as_a_program(tmp_path):
    clone(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    refused = make(tmp_path, "setup", "VENV=mine")
    assert "mine is there, and is no environment" in refused.communicate()[0] and refused.returncode
    assert (tmp_path / "mine" / "kept").exists()
    stand_in(tmp_path / "my env" / "bin" / "python")
    for value in (
        "$(touch oops)",
        "$(shell touch oops)",
        "`touch oops`",
        "a folder",
        "it's; touch oops",
        '"; touch oops',
    ):
        done = make(tmp_path, "all", "VENV=my env", f"DATA_DIR={value}", "NOTEBOOK=03", "FORCE=1")
        assert "Error" not in done.communicate()[0] and done.returncode == 0
        called = (tmp_path / "called").read_text().splitlines()
        for option, expected in (("data-dir", value), ("notebook", "03"), ("force", "1"), ("profile", "quick")):
            assert called[len(called) - called[::-1].index(f"<--{option}>")] == f"<{expected}>"
        assert not (tmp_path / "oops").exists()


@pytest.mark.parametrize("uv", [True, False])
def test_the_lock_is_installed_by_uv_where_it_is_there_else_by_pip(tmp_path, uv):
    """With stand-ins that keep how they were called."""
    clone(tmp_path)
    stand_in(tmp_path / "env" / "bin" / "python", "%s")
    stand_in(tmp_path / "tools" / ("uv" if uv else "another"), "%s")
    command, path = [sys.executable, "install.py", "env"], f"{tmp_path / 'tools'}:/bin"
    subprocess.run(command, cwd=tmp_path, env={"PATH": path}, check=True, capture_output=True)
    called = " ".join((tmp_path / "called").read_text().split())
    way = (
        "pip install -q --compile-bytecode --python env/bin/python"
        if uv
        else "-m pip install -q --disable-pip-version-check"
    )
    assert called == f"{way} -r requirements.lock {way} --no-deps -e ."


def test_an_installation_that_fails_says_how_much_disk_it_takes_and_how_much_is_free(tmp_path):
    clone(tmp_path)
    python = stand_in(tmp_path / "env" / "bin" / "python")
    python.write_text("#!/bin/sh\nexit 1\n")
    failed = subprocess.run([sys.executable, "install.py", "env"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert re.search(r"tries again \(it takes up to 10 GB of disk, \d+\.\d are free here\)", failed.stderr)


@needs_make
def test_make_uses_an_active_conda_environment_but_not_the_base(tmp_path):
    clone(tmp_path)
    stand_in(tmp_path / "conda" / "bin" / "python")
    conda = {"CONDA_PREFIX": str(tmp_path / "conda"), "CONDA_DEFAULT_ENV": "weightsum"}
    make(tmp_path, "book", **conda).wait()
    assert "<book>" in (tmp_path / "called").read_text()
    (tmp_path / "called").unlink()
    other = str(stand_in(tmp_path / "other" / "python"))
    make(tmp_path, "book", f"PYTHON={other}", **conda | {"CONDA_DEFAULT_ENV": "base"}).wait()
    assert (tmp_path / "called").read_text().split() == ["<install.py>", "<.venv>", "<named>"]


@pytest.mark.parametrize(("version", "refused"), [((3, 10, 4), True), ((3, 14, 0), True), ((3, 13, 9), False)])
def test_another_python_is_refused_with_the_range(tmp_path, monkeypatch, version, refused):
    spec = importlib.util.spec_from_file_location("install", ROOT / "install.py")
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    clone(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(install.subprocess, "run", lambda command, **options: None)
    said = install.install(tmp_path / ".venv", named=False)
    wanted = f"Python 3.11 to 3.13 is needed, this is {'.'.join(map(str, version))}; name one: make all PYTHON="
    assert said.startswith(wanted) if refused else said == ""
    assert (tmp_path / ".venv").exists() is not refused
    asked = Requirement("python" + PROJECT["requires-python"]).specifier
    assert (
        asked.contains("3.11.0")
        and asked.contains("3.13.9")
        and not (asked.contains("3.10.9") or asked.contains("3.14.0"))
    )


@needs_make
@pytest.mark.hard
def test_two_that_install_at_once_and_one_that_is_killed_end_with_one_whole_environment(tmp_path):
    clone(tmp_path)
    for moment, all_of_it in ((0.3, True), (1.5, False), (4.0, True)):  # the installer and its pip, or it alone
        killed = make(tmp_path, "setup")
        time.sleep(moment)
        found = subprocess.run(
            ["pgrep", "-g", str(killed.pid), *([] if all_of_it else ["-f", "install.py"])], capture_output=True
        )
        for process in map(int, found.stdout.split()):
            os.kill(process, signal.SIGKILL)
        killed.wait()
    both = [make(tmp_path, "setup") for _ in "ab"]
    said = [each.communicate()[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    assert sum("installing the locked packages" in text for text in said) == 1
    python = tmp_path / ".venv" / "bin" / "python"
    assert b"tiny" in subprocess.run([python, "-m", "pip", "list"], capture_output=True).stdout
    (tmp_path / "requirements.lock").write_text("# another\n")
    again = make(tmp_path, "setup")
    assert "installing" in again.communicate()[0] and again.returncode == 0
    others = [path for path in Path.home().glob(".pyenv/versions/3.1[23]*/bin/python") if path.exists()]
    for other in others:
        named = make(tmp_path, "setup", f"PYTHON={other}")
        said = named.communicate()[0]
        assert named.returncode == 0 and "installing" in said, said
        found = subprocess.run([python, "-V"], capture_output=True, text=True).stdout
        assert found == subprocess.run([other, "-V"], capture_output=True, text=True).stdout
