"""The one runner behind make, tests and CI: execute the notebooks with a parameter file, build the book."""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from weightsum_lib import cache, params
from weightsum_lib.params import Params, ParamsError

ROOT = cache.PACKAGE.parent
NOTEBOOKS = ROOT / "notebooks"
BOOK = ROOT / "book"
PUBLISHED = BOOK / "published"


class RunError(RuntimeError):
    """The study can't go on; the message says why and what to do."""


def notebook_names() -> list[str]:
    """The notebooks in reading order."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.py"))


def check(p: Params) -> None:
    """Get the device and the datasets before any notebook runs, or find out that they can't be had.

    A notebook then downloads nothing: what the runner could not get, a stand-in has to do for.

    Raises:
        ParamsError: its device is not there.
        DataError: one of its datasets is neither there nor allowed a stand-in, or is damaged.
    """
    from weightsum_lib import data, study

    study.pick_device(p.device)
    for name in params.DATASETS:
        data.load(
            name, p.data_dir, p.allow_standin, p.train_images, p.test_images, str(Path(p.results_dir) / "standins")
        )
    os.environ[data.NO_DOWNLOAD] = "1"


def _prepared(p: Params, name: str) -> Path:
    return Path(p.data_dir or os.devnull) / f"{name}.safetensors"


def _stamp(name: str, p: Params) -> str:
    """A digest of all that the executed notebook depends on."""
    source = (NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8")
    modules = cache.imported_modules(source)
    content = {"notebook": source, "library": cache.source_digest(*sorted(modules))}
    if _takes_parameters(source):
        prepared = {n: _prepared(p, n) for n in params.DATASETS}
        content["params"] = p.as_dict()
        content["data"] = {n: cache.file_sha256(f) for n, f in prepared.items() if f.is_file()}
        content["device"] = p.device if p.device != "auto" else Path("/dev/nvidiactl").exists()
    return cache.content_key(content)


def _takes_parameters(source: str) -> bool:
    return 'tags=["parameters"' in source


def execute(name: str, p: Params, folder: Path) -> bool:
    """Execute one notebook with papermill unless nothing that it depends on has changed.

    It runs aside; ``<folder>/<name>.ipynb`` is replaced in one piece, on success and on failure (then
    with the traceback in it, and without the results that would be stale).

    Returns:
        whether it succeeded.
    """
    target, stamp_file = folder / f"{name}.ipynb", folder / f"{name}.stamp.json"
    with cache.lock(folder / f"{name}.lock"):
        stamp = _stamp(name, p)
        if _fresh(name, stamp, folder):
            print(f"{name}: up to date")
            return True
        stamp_file.unlink(missing_ok=True)
        print(f"{name}: running with params/{p.profile}.yaml", flush=True)
        started = time.perf_counter()
        error = _papermill(name, p, target)
        seconds = time.perf_counter() - started
        if error:
            (folder / f"{name}.json").unlink(missing_ok=True)
            print(f"{name}: FAILED after {seconds:.0f} s: {error}\n  traceback: {target}", file=sys.stderr)
            return False
        cache.write_json(stamp_file, {"stamp": stamp, "results": _results_digest(name, folder)})
        print(f"{name}: done in {seconds:.0f} s", flush=True)
        return True


def _papermill(name: str, p: Params, target: Path) -> str:
    """Run one notebook into ``target``; returns what went wrong, or an empty string."""
    import jupytext
    import papermill

    source = NOTEBOOKS / f"{name}.py"
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    values = p.as_dict() if _takes_parameters(source.read_text(encoding="utf-8")) else {}
    with cache.replaced(target) as temporary, _terminal(target.with_suffix(".progress"), name):
        aside = temporary.with_suffix(".ipynb")  # papermill looks at the suffix
        draft = aside.with_stem(aside.stem + "-draft")
        try:
            jupytext.write(notebook, draft, fmt="ipynb")
            papermill.execute_notebook(
                draft,
                aside,
                values,
                kernel_name="python3",
                progress_bar=False,
                cwd=ROOT,
                extra_arguments=["--log-level=CRITICAL"],  # no word of the kernel's own, an interrupt at its end
            )
            error = ""
        except papermill.PapermillExecutionError as failure:
            error = f"{failure.ename}: {failure.evalue}"
        except RuntimeError as failure:  # the kernel died, of lack of memory for example
            error = str(failure)
        finally:
            draft.unlink(missing_ok=True)
            if aside.exists():
                executed = jupytext.read(aside)
                for key in ("input_path", "output_path"):  # where this machine keeps its files is nobody's business
                    executed.metadata.get("papermill", {}).pop(key, None)
                for cell in executed.cells:
                    if "injected-parameters" in cell.metadata.get("tags", []):
                        cell.metadata["tags"].append("hide-input")
                jupytext.write(executed, aside, fmt="ipynb")
                aside.replace(temporary)
    return error


class _terminal:
    """While a notebook runs: copy its progress lines to the terminal."""

    def __init__(self, path: Path, name: str):
        self.path, self.name, self.end = path, name, threading.Event()

    def __enter__(self):
        self.path.write_text("", encoding="utf-8")
        os.environ["WEIGHTSUM_PROGRESS"] = str(self.path.resolve())
        self.thread = threading.Thread(target=self._copy)
        self.thread.start()

    def _copy(self):
        with open(self.path, encoding="utf-8") as file:
            ended = False
            while not ended:
                ended = self.end.wait(0.5)
                for line in file:
                    print(f"  {self.name}: {line}", end="", flush=True)

    def __exit__(self, *_):
        self.end.set()
        self.thread.join()
        os.environ.pop("WEIGHTSUM_PROGRESS", None)
        self.path.unlink(missing_ok=True)


def own_kernel() -> None:
    """Make Jupyter find this environment's ``python3`` kernel before any other on the machine."""
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.environ.pop("JUPYTER_PATH", None)
    spec = Path(sys.prefix) / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    if not spec.exists():
        raise RunError(f"no kernel at {spec}; install ipykernel into this environment: `make setup`")


def run_notebooks(p: Params) -> bool:
    """Execute all notebooks of a profile, one after another; a failure doesn't stop the others."""
    own_kernel()
    folder = Path(p.results_dir) / p.profile
    folder.mkdir(parents=True, exist_ok=True)
    todo = notebook_names()
    if not all(_fresh(name, _stamp(name, p), folder) for name in todo):
        check(p)
    return all([execute(name, p, folder) for name in todo])


def _fresh(name: str, stamp: str, folder: Path) -> bool:
    """Whether the executed notebook and its results are those of this stamp."""
    file = folder / f"{name}.stamp.json"
    if not (file.exists() and (folder / f"{name}.ipynb").exists()):
        return False
    old = cache.read_json(file)
    return old["stamp"] == stamp and old["results"] == _results_digest(name, folder)


def _results_digest(name: str, folder: Path) -> str:
    """Of the results file, which the same notebook in JupyterLab may have written anew; empty without one."""
    path = folder / f"{name}.json"
    return cache.file_sha256(path) if path.exists() else ""


def _check_executed(folder: Path) -> None:
    missing = [name for name in notebook_names() if not (folder / f"{name}.ipynb").exists()]
    if missing:
        raise RunError(
            f"{folder} has no executed {', '.join(missing)}; make them first: make all PROFILE={folder.name}"
        )


def publish(p: Params) -> None:
    """Keep a profile's finished run as ``book/published`` and update the README from it.

    Raises:
        RunError: the run is not whole, not of the present code and parameters, or not of one clean commit.
    """
    from weightsum_lib import report

    folder = Path(p.results_dir) / p.profile
    _check_executed(folder)
    stale = [name for name in notebook_names() if not _fresh(name, _stamp(name, p), folder)]
    if stale:
        raise RunError(
            f"{', '.join(stale)} in {folder} failed or is not of this code and these parameters; run it again"
        )
    commits = {
        path.name: cache.read_json(path)["provenance"]["commit"]
        for path in folder.glob("[0-9]*[a-z0-9].json")
        if not path.name.endswith(".stamp.json")
    }
    if len(set(commits.values())) > 1 or any(not c.isalnum() or c == "unknown" for c in commits.values()):
        raise RunError(
            f"a published run is of one commit without changes, this is of {commits}; commit, and run it again"
        )
    report.publish([*_made(folder), *bench_files(folder)], folder, PUBLISHED, ROOT / "README.md")
    print(f"published: {PUBLISHED}, README.md")


_NO_PAGES = {"_build", "published", "__pycache__"}  # in the book's folder


def _made(folder: Path) -> list[Path]:
    """The executed notebooks and the results of a profile."""
    return sorted(
        f for f in folder.glob("[0-9][0-9]_*") if f.suffix in (".ipynb", ".json") and ".stamp" not in f.suffixes
    )


def bench_files(folder: Path) -> list[Path]:
    """What ``make bench`` measured, its numbers and its figure: here if it has been run, else in the published run.

    Args:
        folder: a profile's results, beside which ``make bench`` writes its own.
    """
    beside = folder.parent if (folder.parent / "bench.json").exists() else PUBLISHED
    return [beside / "bench.json", beside / "bench.png"]


def build_book(folder: Path) -> Path:
    """Build the report from executed notebooks and results; returns the path of its first page.

    Args:
        folder: holds ``<notebook>.ipynb`` and ``<notebook>.json``: a profile's results, or ``book/published``.

    Raises:
        RunError: nothing to build from, or a page has a broken link or a missing number.
    """
    _check_executed(folder)
    html, stamp_file = BOOK / "_build" / "html", BOOK / "_build" / "stamp.json"
    with cache.lock(BOOK / "_build" / "build.lock"):
        made, bench = _made(folder), bench_files(folder)
        pages = [f for f in sorted(BOOK.rglob("*")) if f.is_file() and not _NO_PAGES & set(f.relative_to(BOOK).parts)]
        others = [f for profile in sorted(folder.parent.iterdir()) if profile.is_dir() for f in _made(profile)]
        kept = [f for f in [folder / "headline.json"] if f.exists()]
        files = {os.path.relpath(f, ROOT): cache.file_sha256(f) for f in (*pages, *made, *bench, *others, *kept)}
        library = {path.name: path.read_text(encoding="utf-8") for path in sorted(cache.PACKAGE.glob("*.py"))}
        stamp = cache.content_key([str(folder), files, library])
        if stamp_file.exists() and (html / "index.html").exists() and cache.read_json(stamp_file)["stamp"] == stamp:
            print("book: up to date")
            return html / "index.html"
        from weightsum_lib import report  # draws: too slow to load where there is nothing to do

        source = BOOK / "_build" / "source"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(BOOK, source, ignore=shutil.ignore_patterns(*_NO_PAGES))
        for name in ("notebooks", "results"):
            (source / name).mkdir()
        for path in (*made, *bench):
            shutil.copyfile(path, source / ("notebooks" if path.suffix == ".ipynb" else "results") / path.name)
        report.write_headline(folder, source / "results")
        stamp_file.unlink(missing_ok=True)
        shutil.rmtree(html, ignore_errors=True)
        log = BOOK / "_build" / "build.log"
        command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", source]
        options = ["--path-output", BOOK, "--all", "-W", "-n", "--keep-going", "-q"]
        built = subprocess.run([*map(str, command + options)], capture_output=True, text=True)
        log.write_text(built.stdout + built.stderr, encoding="utf-8")
        if built.returncode:
            lines = [
                line for line in (built.stdout + built.stderr).splitlines() if "WARNING" in line or "ERROR" in line
            ]
            raise RunError(
                "the book is not whole:\n  " + "\n  ".join(lines[:20] or [built.stderr[-2000:]]) + f"\nlog: {log}"
            )
        cache.write_json(stamp_file, {"stamp": stamp})
    return html / "index.html"


def _overrides(arguments) -> dict:
    """Knobs from the command line (make's variables); empty ones are not set."""
    values = {}
    if arguments.data_dir:
        values["data_dir"] = os.path.expanduser(arguments.data_dir)  # not every shell expands DATA_DIR=~/…
    if arguments.device:
        values["device"] = arguments.device
    if arguments.seeds:
        if not arguments.seeds.isdigit():
            raise ParamsError(f"SEEDS must be a number of seeds such as 3, got '{arguments.seeds}'")
        values["seeds"] = int(arguments.seeds)
    return values


def main(argv: list[str] | None = None) -> int:
    """The command line: ``python -m weightsum_lib.run {notebooks,book,all} --profile quick``."""
    parser = argparse.ArgumentParser(prog="python -m weightsum_lib.run", description=__doc__)
    parser.add_argument("step", choices=("notebooks", "book", "all", "publish"))
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--seeds", default="")
    parser.add_argument("--device", default="")
    arguments = parser.parse_args(argv)
    os.chdir(ROOT)
    try:
        if arguments.profile == "published":
            if arguments.step != "book":
                raise ParamsError("'published' is a stored run, not a profile to run: make book PROFILE=published")
            folder, succeeded = PUBLISHED, True
        else:
            p = params.read(arguments.profile, _overrides(arguments))
            folder = Path(p.results_dir) / p.profile
            succeeded = run_notebooks(p) if arguments.step in ("notebooks", "all") else True
        if arguments.step == "publish":
            publish(p)
        if arguments.step in ("book", "all"):
            print(f"The report: {build_book(folder).resolve()}")
        if not succeeded:
            print("At least one notebook failed; its page in the report shows the traceback.", file=sys.stderr)
        return 0 if succeeded else 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
