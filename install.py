"""Make the environment of the study, or find it whole: ``python install.py FOLDER [named]``, standard library alone.

It runs under any Python 3, so that one that is too old or too new is told so. Two that install at once wait for each
other; one that was killed leaves nothing that the next believes. ``named`` says that this Python was asked for.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

LEAST, MOST = (3, 11), (3, 13)
GB = 10  # what is downloaded, and the 7 that stay: torch's CUDA libraries, on Linux
OURS = "made-by-make"  # in an environment that was made here, and may be made again


def python_of(folder):
    """The Python of an environment."""
    return folder.joinpath(*(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))


def alone(file):
    """Wait until no other process installs into this copy of the study, nor what one that was killed had started."""
    os.set_inheritable(file.fileno(), True)  # so that what is started below holds the lock too
    with contextlib.suppress(ImportError):  # not on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another make installs here; waiting until it has ended (a few minutes)", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)


def is_of_this_python(folder):
    """Whether an environment is of the version that runs this, as far as it says."""
    with contextlib.suppress(OSError):
        found = re.search(r"^version\w* *= *(\d+)\.(\d+)", (folder / "pyvenv.cfg").read_text(), re.MULTILINE)
        return not found or tuple(map(int, found.groups())) == sys.version_info[:2]
    return True


def make(folder):
    """Make an environment of this Python, where there is none or one that make had made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OURS).touch()
    for left in folder.iterdir():
        if left.name != OURS:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, close_fds=False)


def install(folder, named):
    """Make the environment whole; returns what stands in the way, or an empty string."""
    content = b"".join(Path(name).read_bytes() for name in ("requirements.lock", "pyproject.toml"))
    done = folder / ("installed-" + hashlib.sha256(content).hexdigest()[:12])
    known = is_of_this_python(folder) or not named
    whole = bool(list(folder.glob("installed-*")))
    if done.exists() and known:
        return ""
    if whole or (folder / OURS).exists() or not folder.exists() or not any(folder.iterdir()):
        if not (whole and known):
            if not LEAST <= sys.version_info[:2] <= MOST:
                this = ".".join(map(str, sys.version_info[:3]))
                return f"Python 3.11 to 3.13 is needed, this is {this}; name one: make all PYTHON=python3.12"
            make(folder)
    elif not python_of(folder).exists():
        return f"{folder} is there, and is no environment; delete it, or name another: make setup VENV=.env"
    elif not known:
        return f"{folder} is of another Python, and make did not make it; name another: make setup VENV=.env"
    for left in folder.glob("installed-*"):
        left.unlink()
    print(f"installing the locked packages into {folder} (a few minutes, once)", flush=True)
    pip, uv = [str(python_of(folder)), "-m", "pip", "install", "-q", "--disable-pip-version-check"], shutil.which("uv")
    if uv:  # several times as fast
        pip = [uv, "pip", "install", "-q", "--compile-bytecode", "--python", str(python_of(folder))]  # as pip does
    for what in (["-r", "requirements.lock"], ["--no-deps", "-e", "."]):
        subprocess.run([*pip, *what], check=True, close_fds=False)
    done.touch()
    return ""


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    try:
        with open("requirements.lock", "rb") as file:
            alone(file)
            sys.exit(install(Path(sys.argv[1]), "named" in sys.argv[2:]) or 0)
    except subprocess.CalledProcessError as error:
        free = shutil.disk_usage(".").free / 1e9
        sys.exit(f"{error}; the same command tries again (it takes up to {GB} GB of disk, {free:.1f} are free here)")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command begins the installation anew")
