"""The one runner behind make, tests and CI: execute the notebooks with a parameter file, build the book."""

import argparse
import contextlib
import functools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from weightsum_lib.study import params, pool, store
from weightsum_lib.study.params import Params, ParamsError

sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema makes 39 parsers of it, for a second; no notebook wants one
ROOT = store.ROOT
NOTEBOOKS, BOOK = ROOT / "notebooks", ROOT / "book"
PUBLISHED = BOOK / "published"
_NO_PAGES = {"_build", "published", "__pycache__"}  # in the book's folder


class RunError(RuntimeError):
    """The study can't go on; the message says why and what to do."""


def notebook_names(p: Params | None = None) -> list[str]:
    """The notebooks in reading order: all, or those that a profile has."""
    names = sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.py"))
    return [name for name in names if not (p and p.pages) or name[:2] in p.pages]


def check(p: Params) -> None:
    """Get the device and the datasets before any notebook runs, or find out that they can't be had.

    What it could not download a notebook doesn't try again: a stand-in has to do.

    Raises:
        ParamsError: its device is not there.
        DataError: one of its datasets is neither there nor allowed a stand-in, or is damaged.
    """
    from weightsum_lib.study import config, data  # slow to load, as all that computes

    config.pick_device(p.device)
    for name in params.DATASETS:
        data.load(name, p.data_dir, p.allow_standin, p.train_images, p.test_images, f"{p.results_dir}/standins")


_sha256 = functools.lru_cache(lambda path, size, changed: store.file_sha256(path))


def _digests(*paths: Path) -> dict[str, str]:
    """SHA-256 of those files that exist, by name."""
    return {os.path.relpath(p, ROOT): _sha256(p, (s := p.stat()).st_size, s.st_mtime_ns) for p in paths if p.is_file()}


_PARAMETERS = 'tags=["parameters"'  # of the cell below which a notebook's parameters are put in


def _source(name: str) -> str:
    return (NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8")


def _stamp(name: str, p: Params) -> str:
    """A digest of all that the executed notebook depends on."""
    source = _source(name)
    content = {"notebook": source}
    try:
        content["library"] = store.code_digest(*sorted(store.imported(source)))
    except (SyntaxError, LookupError) as error:  # it can't succeed; its page will show why
        content["library"] = str(error)
    if _PARAMETERS in source:
        content |= {"params": asdict(p), "claims": store.file_sha256(params.CLAIMS)}
        content["data"] = _digests(*(Path(p.data_dir or os.devnull) / f"{d}.safetensors" for d in params.DATASETS))
        content["device"] = p.device if p.device != "auto" else Path("/dev/nvidiactl").exists()
    return store.content_key(content)


def _made(name: str, folder: Path) -> list[Path]:
    """The executed notebook and its results."""
    return [path for suffix in ("ipynb", "json") if (path := folder / f"{name}.{suffix}").is_file()]


def _is_fresh(name: str, p: Params, folder: Path) -> bool:
    """Whether the executed notebook and its results are those that would be made now."""
    made = {"stamp": _stamp(name, p), "made": _digests(*_made(name, folder))}
    return store.read_json(folder / f"{name}.stamp.json") == made


def execute(name: str, p: Params, folder: Path) -> bool:
    """Execute one notebook unless nothing that it depends on has changed.

    It runs aside; ``<folder>/<name>.ipynb`` is replaced in one piece, on success and on failure (then
    with the traceback in it, and without the results that would be stale).

    Returns:
        whether it succeeded.
    """
    target, stamp_file = folder / f"{name}.ipynb", folder / f"{name}.stamp.json"
    with store.alone(folder / f"{name}.lock"):
        if _is_fresh(name, p, folder):
            print(f"{name}: up to date", flush=True)
            return True
        stamp_file.unlink(missing_ok=True)
        print(f"{name}: running with params/{p.profile}.yaml", flush=True)
        stamp, started = _stamp(name, p), time.perf_counter()
        error = _run(name, p, target)
        seconds = time.perf_counter() - started
        if error:
            (folder / f"{name}.json").unlink(missing_ok=True)
            print(f"{name}: FAILED after {seconds:.0f} s: {error}\n  traceback: {target}", file=sys.stderr, flush=True)
            return False
        if store.edited():  # before or after the kernel has read it: who knows
            print(f"{name}: the library was edited meanwhile; it will run again", file=sys.stderr, flush=True)
        else:
            store.write_json(stamp_file, {"stamp": stamp, "made": _digests(*_made(name, folder))})
        print(f"{name}: done in {seconds:.0f} s", flush=True)
        return True


def _run(name: str, p: Params, target: Path) -> str:
    """Run one notebook into ``target`` with papermill; returns what went wrong, or an empty string."""
    import jupytext
    import nbformat
    import papermill

    notebook, error = jupytext.reads(_source(name), "py:percent"), ""
    values = p.as_dict() if _PARAMETERS in _source(name) else {}
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of each knob that isn't in the parameters cell
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it shows how a kernel ended that was told to end
    # no word of the kernel's own, an interrupt at its end; its standard error stays ours, for lines of progress
    quiet = ["--log-level=CRITICAL", "--IPKernelApp.capture_fd_output=False"]
    options = {"kernel_name": "python3", "language": "python", "progress_bar": False, "cwd": ROOT}
    options |= {"extra_arguments": quiet, "shutdown_kernel": "immediate"}  # an interrupt ends it at once
    with store.replaced(target) as temporary:
        try:
            with pool.progress_of(name):
                papermill.execute_notebook(notebook, temporary, values, **options)
        except papermill.PapermillExecutionError as failure:
            error = f"{failure.ename}: {failure.evalue}"
        except RuntimeError as failure:  # the kernel died, of lack of memory for example
            error = str(failure)
        executed = nbformat.read(temporary, as_version=4)
        executed.metadata.pop("papermill", None)
        for cell in executed.cells:
            if "injected-parameters" in cell.metadata.get("tags", []):
                cell.metadata["tags"].append("remove-cell")
        temporary.write_text(_without_paths(nbformat.writes(executed), p), encoding="utf-8")
    return error


def _without_paths(notebook: str, p: Params) -> str:
    """A notebook's text without the folders of this machine, which a warning or a parameter may name."""
    folders = {p.data_dir: "DATA_DIR", p.results_dir: "RESULTS_DIR", tempfile.gettempdir(): "TMP", sys.prefix: "PYTHON"}
    folders |= {sys.base_prefix: "PYTHON", str(Path.home()): "~", str(ROOT): "."}
    folders = {os.path.normpath(folder): name for folder, name in folders.items() if os.path.isabs(folder)}
    longest_first = sorted(folders.keys() - {os.sep}, key=len, reverse=True)
    named = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    lines = notebook.splitlines(keepends=True)
    return "".join(line if '"image/' in line else named.sub(lambda at: folders[at[0]], line) for line in lines)


def _cells(path: Path) -> list | None:
    """The cells of a notebook of either form; None where it can't be read."""
    import jupytext

    with contextlib.suppress(ValueError):
        return [(cell.cell_type, cell.source.strip()) for cell in jupytext.read(path).cells]
    return None


def _differing(names: Sequence[str]) -> list[list[Path]]:
    """The .py and the .ipynb, the older one first, of those notebooks whose cells were edited in one of them alone."""
    pairs = [[NOTEBOOKS / f"{name}.{suffix}" for suffix in ("py", "ipynb")] for name in names]
    return [sorted(two, key=os.path.getmtime) for two in pairs if two[1].is_file() and _cells(two[0]) != _cells(two[1])]


def pair() -> None:
    """Before JupyterLab makes each .ipynb and its .py the same by the younger one, keep the older where they differ."""
    for older, younger in _differing(notebook_names()):
        kept = shutil.copy2(older, older.with_name(f"{older.name}.bak"))
        print(f"{older.name} differs from {younger.name}, which is younger and counts; kept as {kept}")


def run_notebooks(p: Params, folder: Path, begins: str = "", again: bool = False) -> bool:
    """Execute the notebooks of a profile, or those whose name ``begins`` so; failed ones stop none.

    On a CPU with room for it several run two at a time, after all that they need has been trained in one queue.

    Args:
        p: the profile.
        folder: of its results.
        begins: of the notebooks that are meant; the others stay as they are.
        again: also where nothing has changed.

    Raises:
        RunError: there is no such notebook, or one has edits that its .py lacks.
    """
    names = [name for name in notebook_names(p) if name.startswith(begins)]
    if not names:
        raise RunError(f"no notebook begins with '{begins}'; there are {', '.join(notebook_names(p))}")
    for older, younger in _differing(names):
        if younger.suffix == ".ipynb":
            what = f"{younger} has other cells than its .py, which is what runs"
            raise RunError(f"{what}. Keep the edit (jupytext --sync {younger}) or delete that file")
        print(f"{older} has other cells than its .py, which is younger and runs")
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")  # its python3 kernel before any other
    store.sweep(folder.parent)
    for name in names if again else ():
        (folder / f"{name}.stamp.json").unlink(missing_ok=True)
    if stale := [name for name in names if not _is_fresh(name, p, folder)]:
        check(p)
    if (at_once := _train_first(p) if len(stale) > 1 else 1) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() // at_once))
    with pool.opened(at_once, fresh=True) as pages:
        return all([ok for _, ok in pages.each(names, lambda n: (n, functools.partial(execute, n, p, folder), 0))])


def _train_first(p: Params) -> int:
    """How many notebooks of a profile run at once; where that are several, train what they need."""
    from weightsum_lib.study import plan, runs

    study = runs.Study(p)
    if (at_once := study.notebooks_at_once()) > 1:
        with pool.progress_of("training"):
            try:
                study.train_all(plan.queue(study))
            except Exception as error:  # of one run, on whose pages it will show
                pool.report_progress(f"stopped by {type(error).__name__}: {error}")
    return at_once


def train(p: Params, only_plan: bool) -> None:
    """Train every missing run of a profile, in the order that makes a whole report early; or say which they are.

    Raises:
        RunError: the claims that the runs will be held to are not committed.
    """
    from weightsum_lib.study import plan, runs

    check(p)
    study = runs.Study(p)
    queue = plan.queue(study)
    missing, hours = [config for config in queue if study.is_missing(config)], 0.0
    if only_plan:
        for number, config in enumerate(missing, start=1):
            hours += study.hours(config)
            print(f"{number:4d}  {hours:6.2f} h  {config.describe()}", flush=True)
        said = f"{len(missing)} of {len(queue)} runs are missing: {hours:.1f} hours, one after another"
        print(f"{said}; {study.at_once()} at once on {study.device_name()}")
    elif subprocess.run(["git", "-C", params.CLAIMS.parent, "status", "-s", params.CLAIMS], capture_output=True).stdout:
        raise RunError("params/claims.yaml has changes: what a run is held to is committed before it is trained")
    else:
        study.train_all(queue)


def publish(p: Params, folder: Path) -> None:
    """Keep a profile's finished run as ``book/published`` and update the README from it; of a standing one its pages.

    Raises:
        RunError: the run is not whole, not of the present code and parameters, or not of one clean commit.
    """
    from weightsum_lib.report import page

    if stale := [name for name in notebook_names(p) if not _is_fresh(name, p, folder)]:
        why = "failed, or is not of this code, these parameters and these claims; run it again"
        raise RunError(f"{', '.join(stale)} in {folder} {why}")
    commits = {store.read_json(f)["provenance"]["commit"] for f in _all_made(folder, p) if f.suffix == ".json"}
    if len(commits) != 1 or any(commit == "unknown" or not commit.isalnum() for commit in commits):
        raise RunError(f"a published run is of one commit without changes, this is of {commits}; commit, run it again")
    if p.pages:
        for path in _all_made(folder, p):
            shutil.copyfile(path, PUBLISHED / f"{p.profile}_{path.name[:2]}{path.suffix}")
        page.write_headline(PUBLISHED, PUBLISHED)
    else:
        from weightsum_lib.study import measure, runs

        files = measure.take_home(runs.Study(p), folder) | standing(folder)
        page.publish(files | {path.name: path for path in _all_made(folder)}, PUBLISHED)
    page.write_readme(PUBLISHED, ROOT / "README.md")
    print(f"published: {PUBLISHED}, README.md")


def _all_made(folder: Path, p: Params | None = None) -> list[Path]:
    """The executed notebooks and the results of a profile."""
    return [path for name in notebook_names(p) for path in _made(name, folder)]


def standing(folder: Path) -> dict[str, Path]:
    """What every report shows, whatever its profile, by its name there: made here, else as it was published.

    That is what ``make bench`` measured, and the pages of the profiles that stand there (``params.STANDING``), such as
    ``literal_01.json``.

    Args:
        folder: a profile's results, beside which those of the others lie.
    """
    here = {name: folder.parent / name for name in ("bench.json", "bench.png", "scale.json")}
    for name, notebook in ((of, page) for of in params.STANDING for page in notebook_names(params.read(of))):
        results = folder.parent / name / f"{notebook}.json"  # of a run that failed there is none
        made = {f"{name}_{notebook[:2]}{suffix}": results.with_suffix(suffix) for suffix in (".json", ".ipynb")}
        here |= made if results.exists() else dict.fromkeys(made, results)
    places = {name: [at for at in (path, PUBLISHED / name) if at.exists()] for name, path in here.items()}
    return {name: found[0] for name, found in places.items() if found}


def build_book(folder: Path) -> Path:
    """Build the report from executed notebooks and results; returns the path of its first page.

    Args:
        folder: holds ``<notebook>.ipynb`` and ``<notebook>.json``: a profile's results, or ``book/published``.

    Raises:
        RunError: nothing to build from, or a page has a broken link or a missing number.
    """
    missing = [name for name in notebook_names() if not (folder / f"{name}.ipynb").exists()]
    if missing:
        raise RunError(f"{folder} has no executed {', '.join(missing)}; make them: make all PROFILE={folder.name}")
    for name in notebook_names() if folder != PUBLISHED else ():
        made, kept = _digests(*_made(name, folder)), store.read_json(folder / f"{name}.stamp.json")
        whole = isinstance(kept, dict) and kept.get("made") == made
        if not whole and (kept is not None or len(made) > 1):  # one that failed has neither stamp nor results
            raise RunError(f"{name} in {folder} is not as it was made; make it again: make all PROFILE={folder.name}")
    build, first = BOOK / "_build", BOOK / "_build" / "html" / "index.html"
    source, stamp_file, log = build / "source", build / "stamp.json", build / "build.log"
    with store.alone(build / "build.lock"):
        used = {path.name: path for path in _all_made(folder)} | standing(folder)
        pages = [path for path in BOOK.rglob("*") if not _NO_PAGES & set(path.relative_to(BOOK).parts)]
        stamp = {"of": str(folder), "files": _digests(*pages, *used.values(), *store.PACKAGE.rglob("*.py"))}
        if first.exists() and store.read_json(stamp_file) == stamp:
            print("book: up to date")
            return first
        from weightsum_lib.report import page  # draws: too slow to load where there is nothing to do

        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(BOOK, source, ignore=shutil.ignore_patterns(*_NO_PAGES))
        for name, path in used.items():
            to = source / ("notebooks" if path.suffix == ".ipynb" else "results")
            to.mkdir(exist_ok=True)
            shutil.copyfile(path, to / name)
        for opening in BOOK.glob("*_[0-9][0-9].md"):
            page.open_with(source / "notebooks" / f"{opening.stem}.ipynb", opening)
        page.write_headline(folder, source / "results")
        stamp_file.unlink(missing_ok=True)
        shutil.rmtree(first.parent, ignore_errors=True)
        program = "import weightsum_lib.run, jupyter_book.cli.main as cli; cli.main()"  # the first: see rfc3987 above
        command = [sys.executable, "-c", program, "build", str(source)]
        options = ["--path-output", str(BOOK), "--all", "-W", "-n", "--keep-going", "-q"]
        built = subprocess.run(command + options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log.write_text(said := built.stdout, encoding="utf-8")
        if built.returncode:
            lines = [line for line in said.splitlines() if "WARNING" in line or "ERROR" in line] or [said[-2000:]]
            raise RunError("the book is not whole:\n  " + "\n  ".join(lines[:20]) + f"\nlog: {log}")
        store.write_json(stamp_file, stamp)
    return first


def main(argv: list[str] | None = None) -> int:
    """The command line: a step and its options, such as ``python -m weightsum_lib.run all --profile quick``."""
    parser = argparse.ArgumentParser(prog="python -m weightsum_lib.run", description=__doc__)
    parser.add_argument("step", choices=("plan", "train", "notebooks", "book", "all", "publish", "lab", "bench"))
    parser.add_argument("--profile", default="quick")
    for option in ("--data-dir", "--seeds", "--device", "--notebook", "--force"):
        parser.add_argument(option, default="")  # as make's variables, of which an empty one is not set
    given, succeeded = parser.parse_args(argv), True
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if given.profile == "published" and given.step != "book":
            raise ParamsError("'published' is a stored run, not a profile to run: make book PROFILE=published")
        if given.step == "lab":
            pair()
            return 0
        if given.step == "bench":
            from weightsum_lib import bench  # slow to load, as all that computes

            bench.main(given.device or "auto")
            return 0
        folder = PUBLISHED
        if given.profile != "published":
            # not every shell expands DATA_DIR=~/…
            knobs = {"data_dir": os.path.expanduser(given.data_dir), "device": given.device, "seeds": given.seeds}
            p = params.read(given.profile, {name: value for name, value in knobs.items() if value != ""})
            if p.pages and given.step in ("book", "all", "publish")[: 2 if p.profile in params.STANDING else 3]:
                raise ParamsError(f"'{p.profile}' is some pages, no report: make notebooks PROFILE={p.profile}")
            folder = Path(p.results_dir) / p.profile
        if given.step in ("plan", "train"):
            train(p, only_plan=given.step == "plan")
        if given.step in ("notebooks", "all"):
            succeeded = run_notebooks(p, folder, given.notebook, given.force not in ("", "0"))
        if given.step == "publish":
            publish(p, folder)
        if given.step in ("book", "all"):
            print(f"The report: {build_book(folder).resolve()}")
        if not succeeded:
            print("At least one notebook failed; its page in the report shows the traceback.", file=sys.stderr)
        return 0 if succeeded else 1
    except (RuntimeError, ParamsError, OSError) as error:  # of the system: a full disk, a folder that is only read
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished epoch of each network", file=sys.stderr)
        return 130


if __name__ == "__main__":
    from weightsum_lib import run  # by the name under which other processes find what it calls

    sys.exit(run.main())
