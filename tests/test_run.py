"""The whole study, with the profile for tests, in a copy of the tree: notebooks, book, and what make decides."""

import contextlib
import getpass
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
import psutil
import pytest
from conftest import SMOKE
from nbclient import NotebookClient

from weightsum_lib import run
from weightsum_lib.study import params, store
from weightsum_lib.study.runs import Study

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [
    "00_how_to_sum",
    "01_mnist_cifar10",
    "02_svhn_cifar10",
    "03_mnist_svhn",
    "04_what_transfers",
    "05_beside_others",
]


@pytest.fixture(scope="module")
def house(tree):
    """The copy after one whole run."""
    tree.first = tree.run("all", *SMOKE)
    return tree


def test_the_study_runs_from_nothing_to_a_report(house):
    assert house.first.returncode == 0, house.first.stdout + house.first.stderr
    assert f"The report: {house.html / 'index.html'}" in house.first.stdout
    for name in NOTEBOOKS:
        assert (house.html / "notebooks" / f"{name}.html").exists()
        kinds = {o.output_type for c in house.notebook(name).cells for o in c.get("outputs", [])}
        assert "error" not in kinds
    result = store.read_json(house.results / "01_mnist_cifar10.json")
    assert result["provenance"]["params"]["device"] == "cpu"  # injected: the notebook's own default is "auto"
    finding = result["values"]["finding"]
    words = re.sub(r"<[^>]+>|`", "", (house.html / "index.html").read_text(encoding="utf-8"))
    assert finding.replace("`", "")[:60] in re.sub(r"\s+", " ", words)
    # the published page of the literal network, under a heading of its own, says what that was made with
    literal = re.sub(r"<[^>]+>", "", (house.html / "notebooks" / "literal_01.html").read_text(encoding="utf-8"))
    assert "The network of the question: VGG16" in literal and "Profile literal: VGG16 at width 1," in literal
    assert "This notebook compares two networks that never met" not in literal


def test_progress_goes_to_the_terminal_and_not_into_the_notebooks(house):
    lines = [line for line in house.first.stderr.splitlines() if re.match(r"  [\w]+: run \d", line)]
    of_pair = [line for line in lines if "mnist+cifar10 joint, third ce, seed 0" in line]
    assert len(of_pair) == 2 and all("min left" in line for line in lines)  # two epochs
    runs = list(house.path.glob("results/runs/*/run.json"))
    assert len(lines) == sum(len(store.read_json(path)["history"]) for path in runs)
    for name in NOTEBOOKS[1:]:
        texts = [o for c in house.notebook(name).cells for o in c.get("outputs", []) if o.output_type == "stream"]
        assert texts == []


def test_what_is_published_is_notebooks_and_results_and_nothing_of_the_runners_own(house):
    names = {path.name for path in run._all_made(house.results)}
    assert names == {f"{name}.ipynb" for name in NOTEBOOKS} | {f"{name}.json" for name in NOTEBOOKS[1:]}
    assert (house.results / f"{NOTEBOOKS[1]}.stamp.json").exists()
    pages = [path for path in house.html.rglob("*") if path.suffix in (".html", ".ipynb", ".md") and path.is_file()]
    runs = [*house.path.glob("results/runs/*/run.json"), *house.path.glob("results/measurements/*.json")]
    assert len(pages) > 15 and len(runs) > 20
    machine = [re.escape(f"{folder}/") for folder in (house.path, sys.prefix, Path.home(), tempfile.gettempdir())]
    machine += [rf"\b{re.escape(name)}\b" for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4]
    for path in (
        *run._all_made(house.results),
        *runs,
        *pages,
    ):  # where this machine keeps its files is nobody's business
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "image/png" not in line]
        found = [match.group() for line in lines for match in re.finditer("|".join(machine), line)]
        assert not found, (path.name, found)


def test_a_warning_that_names_a_folder_of_this_machine_is_shown_without_it(monkeypatch):
    p = params.read("smoke", {"data_dir": "/somewhere/of/mine", "device": "cpu"})
    said = f'{sys.prefix}/lib/x.py:3: "{ROOT}/y" of {Path.home()}/z, /somewhere/of/mine/mnist {sys.prefix}er'
    shown = run._without_paths(said, p)
    assert shown == f'PYTHON/lib/x.py:3: "./y" of ~/z, DATA_DIR/mnist {shown.rsplit(" ", 1)[1]}'
    with monkeypatch.context() as patch:  # of somebody without a home
        patch.setattr(Path, "home", lambda: Path("/"))
        p = params.read("smoke", {"data_dir": "/somewhere/of/mine/", "device": "cpu"})
        assert run._without_paths("<td>a</td> /somewhere/of/mine/mnist", p) == "<td>a</td> DATA_DIR/mnist"
    assert shown.endswith("er") and run._without_paths('"image/png": "/somewhere/of/mine"', p).endswith('of/mine"')


def test_pages_load_nothing_from_elsewhere(house):
    loads = re.compile(
        r"""<(?:script|img|iframe)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//[^>]*>"""
    )
    pages = [p for p in house.html.rglob("*.html") if "_static" not in p.parts]
    assert len(pages) >= 7
    for page in pages:
        text = page.read_text(encoding="utf-8")
        found = [m.group() for m in loads.finditer(text) if 'rel="canonical"' not in m.group()]
        assert not found, f"{page.name}: {found}"
    for sheet in house.html.rglob("*.css"):
        assert not re.search(r"@import\s+(?:url\()?[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8"))


def test_each_figure_has_a_text_for_those_who_do_not_see_it(house):
    for page in [house.html / "index.html", *(house.html / "notebooks" / f"{n}.html" for n in NOTEBOOKS)]:
        article = page.read_text(encoding="utf-8").split("<article", 1)[1].split("</article>", 1)[0]
        for image in re.findall(r"<img[^>]*>", article):
            alt = re.search(r'alt="([^"]*)"', image)
            assert alt and len(alt.group(1)) > 30 and "_images" not in alt.group(1), (page.name, image)


def test_every_page_says_that_standins_were_used(house):
    for page in [house.html / "index.html", *(house.html / "notebooks" / f"{n}.html" for n in NOTEBOOKS[1:])]:
        before_any_number, _, _ = page.read_text(encoding="utf-8").partition("<table")
        assert "synthetic stand-in" in before_any_number, page.name


def test_nothing_changed_means_nothing_is_done_not_even_after_a_touch(house):
    for name in NOTEBOOKS:
        (house.path / "notebooks" / f"{name}.py").touch()
    started = time.perf_counter()
    again = house.run("all", *SMOKE)
    assert again.returncode == 0 and time.perf_counter() - started < 5  # it loads no torch
    assert again.stdout.splitlines()[:-1] == [*(f"{name}: up to date" for name in NOTEBOOKS), "book: up to date"]
    with house.edited("book/reproduce.md", "\n\n", "\n\nA new line of prose.\n\n"):  # is enough to build the book again
        program = f"from weightsum_lib import run; del run.shutil.rmtree; run.main({['book', *SMOKE]})"
        assert "no attribute 'rmtree'" in house.python("-c", program).stderr


def test_an_edited_notebook_runs_again_alone_and_trains_and_measures_nothing(house):
    def measured():
        return {path.name: path.stat().st_mtime_ns for path in (house.path / "results" / "measurements").iterdir()}

    before = measured()
    house.write("notebooks/01_mnist_cifar10.py", "The question as it was asked", "The question as it was put")
    done = house.run("notebooks", *SMOKE)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "01_mnist_cifar10: done" in said and "min left" not in said
    assert all(f"{name}: up to date" in said for name in NOTEBOOKS if name != "01_mnist_cifar10")
    assert measured() == before


def stale(house):
    """The notebooks that would run again, as the copy's own code has it."""
    program = (
        "from pathlib import Path; from weightsum_lib import run; from weightsum_lib.study import params; "
        "p = params.read('smoke', {'device': 'cpu'}); "
        "print(*(n for n in run.notebook_names() if not run._is_fresh(n, p, Path('results/smoke'))))"
    )
    done = house.python("-c", program)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_edited_library_runs_again_what_it_affects_and_prose_nothing(house):
    assert stale(house) == []
    for module, affected in (
        ("report/plots", NOTEBOOKS[1:]),
        ("core/weights", NOTEBOOKS),
        ("study/data", NOTEBOOKS[1:]),
        ("run", []),
        ("bench", []),
    ):
        with house.edited(f"weightsum_lib/{module}.py", "\nimport ", "\nassert True\nimport "):
            assert stale(house) == affected, module
    with house.edited("weightsum_lib/core/weights.py", '"""', '"""Other prose. '):
        assert stale(house) == []
    with house.edited("params/smoke.yaml", "learning_rate: 0.05", "learning_rate: 0.04"):
        assert stale(house) == NOTEBOOKS[1:]
    with house.edited("params/recipes.yaml", "permuted_support: 0.8", "permuted_support: 0.7"):
        assert stale(house) == NOTEBOOKS[1:]
    with house.edited("params/recipes.yaml", "joint signed_gap: {", "joint signed_gap: {equal_norms: true, "):
        assert stale(house) == []  # the profile has no such row


def test_what_was_damaged_is_made_again(house):
    pages = [house.results / made for made in ("00_how_to_sum.ipynb", "03_mnist_svhn.json")]
    whole = [page.read_bytes() for page in pages]
    for page, content in zip(pages, whole, strict=True):
        page.write_bytes(content[: len(content) // 2])
    refused = house.run("book", *SMOKE)
    assert refused.returncode == 2 and "00_how_to_sum in results/smoke is not as it was made" in refused.stderr
    assert stale(house) == ["00_how_to_sum", "03_mnist_svhn"]
    pages[1].write_bytes(whole[1])
    done = house.run("notebooks", *SMOKE)
    assert done.returncode == 0, done.stderr
    assert "00_how_to_sum: done" in done.stdout and "03_mnist_svhn: up to date" in done.stdout
    assert len(house.notebook("00_how_to_sum").cells) > 10


def test_a_failing_notebook_shows_its_traceback_and_a_missing_number_is_named_and_the_others_still_run(house):
    """And edited prose builds the book again, with the notebook that was edited before, and runs none."""
    cell, key = '# %% tags=["parameters"', "`01_mnist_cifar10:finding`"
    house.write("book/reproduce.md", "\n\n", "\n\nA new line of prose.\n\n")
    fails = house.edited("notebooks/02_svhn_cifar10.py", cell, f"# %%\nraise KeyError('planted')\n\n{cell}")
    with fails, house.edited("book/index.md", key, key.replace("finding", "fnding")):
        failed = house.run("all", *SMOKE)
        assert failed.returncode == 2  # the book is not whole
        assert (
            "no 'fnding' among the values of results/01_mnist_cifar10.json; the nearest is 'finding'" in failed.stderr
        )
        assert "02_svhn_cifar10: FAILED" in failed.stderr and "KeyError: 'planted'" in failed.stderr
        assert all(f"{name}: up to date" in failed.stdout for name in NOTEBOOKS if name != "02_svhn_cifar10")
        page = (house.html / "notebooks" / "02_svhn_cifar10.html").read_text(encoding="utf-8")
        assert "planted" in page and "Traceback" in page
        assert "A new line of prose." in (house.html / "reproduce.html").read_text(encoding="utf-8")
        edited = (house.html / "notebooks" / "01_mnist_cifar10.html").read_text(encoding="utf-8")
        assert "The question as it was put" in edited
        assert not (house.results / "02_svhn_cifar10.json").exists()  # no number of a failed page survives
        assert not (house.results / "02_svhn_cifar10.stamp.json").exists()  # it is tried again
    mended = house.run("notebooks", *SMOKE)
    assert mended.returncode == 0 and "min left" not in mended.stdout + mended.stderr, mended.stderr
    assert not [p for p in house.results.iterdir() if p.name.startswith(".")]  # nothing is left half written


def test_a_page_that_is_not_there_is_named_and_an_unclean_run_is_not_published(house, monkeypatch, capsys):
    """In this process, so that the coverage of what it refuses is measured."""
    for name, value in (("JUPYTER_PATH", ""), ("JUPYTER_PREFER_ENV_PATH", "1"), ("WEIGHTSUM_NO_DOWNLOAD", "")):
        monkeypatch.setenv(name, value)
    for name, path in (("ROOT", ""), ("NOTEBOOKS", "notebooks"), ("BOOK", "book"), ("PUBLISHED", "book/published")):
        monkeypatch.setattr(run, name, house.path / path)
    monkeypatch.setattr(params, "PARAMS_DIR", house.path / "params")
    monkeypatch.chdir(house.path)
    away = (house.results / "00_how_to_sum.ipynb").rename(house.results / "away.ipynb")
    assert run.main(["book", *SMOKE]) == 2
    assert "has no executed 00_how_to_sum; make them: make all PROFILE=smoke" in capsys.readouterr().err
    assert not run._is_fresh("00_how_to_sum", params.read("smoke", {"device": "cpu"}), house.results)
    away.rename(house.results / "00_how_to_sum.ipynb")
    assert run.main(["publish", *SMOKE]) == 2
    assert "commit" in capsys.readouterr().err  # the copy is no checkout
    with monkeypatch.context() as changed:
        changed.setattr(params, "CLAIMS", params.PARAMS_DIR / "recipes.yaml")
        assert run.main(["publish", *SMOKE]) == 2
    assert "not of this code, these parameters and these claims" in capsys.readouterr().err
    assert run.main(["publish", *SMOKE, "--seeds", "2"]) == 2
    assert "not of this code, these parameters and these claims" in capsys.readouterr().err
    # nothing but what the house began with
    assert {f.name for f in (house.path / "book" / "published").iterdir()} == {*run.standing(house.path)}


def test_an_edit_of_the_ipynb_alone_is_neither_run_over_nor_lost(house):
    source, paired = (house.path / "notebooks" / f"00_how_to_sum.{suffix}" for suffix in ("py", "ipynb"))
    notebook = jupytext.read(source)
    jupytext.write(notebook, paired)
    assert "up to date" in house.run("notebooks", *SMOKE, "--notebook", "00").stdout  # the same cells
    notebook.cells.append(nbformat.v4.new_code_cell("mine = 1"))
    jupytext.write(notebook, paired)
    refused = house.run("notebooks", *SMOKE, "--notebook", "00")
    assert refused.returncode == 2 and f"{paired} has other cells than its .py" in refused.stderr
    assert "jupytext --sync" in refused.stderr and refused.stdout == ""
    os.utime(source, (time.time() + 9, time.time() + 9))  # git has brought a younger .py, say
    said = house.run("notebooks", *SMOKE, "--notebook", "00")
    assert said.returncode == 0 and "has other cells than its .py, which is younger and runs" in said.stdout
    kept = paired.with_name("00_how_to_sum.ipynb.bak")
    assert house.run("lab").returncode == 0 and nbformat.read(kept, as_version=4).cells[-1].source == "mine = 1"
    paired.write_text("{")
    assert "differs from" in house.run("lab").stdout and kept.read_text() == "{"
    for path in (paired, kept):
        path.unlink()


def test_one_notebook_may_be_forced_and_who_asks_for_it_too_waits(house):
    before = store.read_json(house.results / "01_mnist_cifar10.stamp.json")
    command = [sys.executable, "-m", "weightsum_lib.run", "notebooks", *SMOKE, "--notebook", "00"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    forced = subprocess.Popen([*command, "--force", "1"], cwd=house.path, env=house.environment, **pipes)
    assert "00_how_to_sum: running" in forced.stdout.readline()
    waits = subprocess.run(command, cwd=house.path, env=house.environment, **pipes)
    said = forced.communicate()[0]
    assert forced.returncode == 0 and "00_how_to_sum: done" in said and "01_" not in said
    assert waits.returncode == 0 and f"another process (process {forced.pid}, since" in waits.stdout
    assert "00_how_to_sum.lock: waited" in waits.stdout and "up to date" in waits.stdout.splitlines()[-1]
    assert store.read_json(house.results / "01_mnist_cifar10.stamp.json") == before


@pytest.mark.parametrize("name", [NOTEBOOKS[0], NOTEBOOKS[3]])  # the others have the same parameters cell (test_params)
def test_a_notebook_runs_in_jupyterlab_with_its_default_parameters_and_runs_again(house, name):
    """Cell by cell in the notebooks' folder, as JupyterLab does, without papermill; one of them twice in a kernel."""
    notebook = jupytext.read(house.path / "notebooks" / f"{name}.py")
    if name == NOTEBOOKS[3]:
        notebook.cells += jupytext.read(house.path / "notebooks" / f"{name}.py").cells
    client = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(house.path / "notebooks")}}, timeout=300
    )
    client.execute(env=house.environment | {"JUPYTER_PATH": "", "JUPYTER_PREFER_ENV_PATH": "1"})
    last = [o for c in notebook.cells for o in c.get("outputs", [])][-1]
    assert "data" in last


def test_papermill_by_hand_means_every_line_of_the_file(house, monkeypatch):
    """A profile of one's own, which differs in a number that no network depends on."""
    text = (house.path / "params" / "smoke.yaml").read_text(encoding="utf-8")
    text = text.replace("profile: smoke", "profile: mine").replace("draws: 2", "draws: 3")
    (house.path / "params" / "mine.yaml").write_text(text, encoding="utf-8")
    notebook, page = "notebooks/01_mnist_cifar10.ipynb", house.path / "out.ipynb"
    assert house.python("-m", "jupytext", "--to", "ipynb", "notebooks/01_mnist_cifar10.py").returncode == 0
    command = ["-m", "papermill", notebook, page, "-f", "params/mine.yaml"]
    done = house.python(*command, JUPYTER_PATH="", JUPYTER_PREFER_ENV_PATH="1")
    assert done.returncode == 0 and "min left" not in done.stderr, done.stderr
    monkeypatch.setattr(params, "PARAMS_DIR", house.path / "params")
    result = store.read_json(house.path / "results" / "mine" / "01_mnist_cifar10.json")
    assert result["provenance"]["params"] == params.read("mine").as_dict()
    for made in ("params/mine.yaml", notebook):
        (house.path / made).unlink()


def several_at_once():
    """Whether this machine has room for two notebooks of the profile for tests."""
    return Study(params.read("smoke", {"device": "cpu", "networks_at_once": 2})).notebooks_at_once() > 1


def kernels(runner):
    """The kernels below a process; one that ends meanwhile is none."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(runner.pid).children(recursive=True):
            found += [process] * ("ipykernel" in " ".join(process.as_dict(["cmdline"], ad_value=())["cmdline"]))
    return found


@pytest.mark.parametrize(("several", "how"), [(False, signal.SIGTERM), (True, signal.SIGINT), (True, signal.SIGKILL)])
def test_a_runner_that_is_ended_takes_its_notebooks_with_it(house, several, how):
    """One with two seeds, so that there is something to train; or two at once, whose networks are there."""
    if several and not several_at_once():
        pytest.skip("no room for two notebooks at once")
    which = [] if several else ["--notebook", "01", "--seeds", "2"]
    command = [sys.executable, "-m", "weightsum_lib.run", "notebooks", *SMOKE, *which, "--force", "1"]
    with house.edited("params/smoke.yaml", "networks_at_once: 1", f"networks_at_once: {1 + several}"):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        runner = subprocess.Popen(command, cwd=house.path, env=house.environment, **pipes)
        while ("02_svhn_cifar10: running" if several else "min left") not in (line := runner.stdout.readline()):
            assert line
        while len(kernels(runner)) < 1 + several:
            assert runner.poll() is None
            time.sleep(0.1)
        below = psutil.Process(runner.pid).children(recursive=True)
        started = time.monotonic()
        (os.killpg if how == signal.SIGINT else os.kill)(runner.pid, how)  # a terminal tells the whole group
        said = runner.communicate()[0]
        assert not psutil.wait_procs(below, timeout=5)[1] and time.monotonic() - started < 5
        if how != signal.SIGKILL:
            assert runner.returncode == 130 and "Traceback" not in said
            assert "goes on from the last finished epoch" in said
