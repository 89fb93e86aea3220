"""The whole study, with the profile for tests, in a copy of the tree: notebooks, book, and what make decides."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from weightsum_lib import cache, params, run

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ["00_how_to_sum", "01_mnist_cifar10", "02_svhn_cifar10", "03_mnist_svhn", "04_what_transfers"]


class House:
    """A copy of the repository, run with this interpreter."""

    def __init__(self, path: Path, environment: dict):
        self.path, self.results, self.html = path, path / "results" / "smoke", path / "book" / "_build" / "html"
        self.environment = {**os.environ, "PYTHONPATH": str(path), **environment}

    def run(self, *arguments):
        command = [sys.executable, "-m", "weightsum_lib.run", *arguments]
        return subprocess.run(command, cwd=self.path, env=self.environment, capture_output=True, text=True)

    def notebook(self, name):
        return nbformat.read(self.results / f"{name}.ipynb", as_version=4)

    def edit(self, file, old, new):
        path = self.path / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return text


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The copy after one whole run, on a machine that has another ``python3`` kernel in every place it may look."""
    top = tmp_path_factory.mktemp("house")
    path = top / "copy"
    for name in ("book", "notebooks", "weightsum_lib", "params"):
        ignore = shutil.ignore_patterns("_build", "published", "__pycache__", "*.ipynb", ".*")
        shutil.copytree(ROOT / name, path / name, ignore=ignore)
    for published in (ROOT / "book" / "published").glob("bench.*"):  # the page on speed needs them
        (path / "book" / "published").mkdir(exist_ok=True)
        shutil.copyfile(published, path / "book" / "published" / published.name)
    foreign = top / "foreign" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    places = {"JUPYTER_PATH": str(top / "foreign"), "JUPYTER_DATA_DIR": str(top / "foreign")}
    house = House(path, places)
    house.first = house.run("all", "--profile", "smoke", "--device", "cpu")
    return house


def test_the_study_runs_from_nothing_to_a_report(house):
    assert house.first.returncode == 0, house.first.stdout + house.first.stderr
    assert f"The report: {house.html / 'index.html'}" in house.first.stdout
    for name in NOTEBOOKS:
        assert (house.html / "notebooks" / f"{name}.html").exists()
        kinds = {o.output_type for c in house.notebook(name).cells for o in c.get("outputs", [])}
        assert "error" not in kinds
    result = cache.read_json(house.results / "01_mnist_cifar10.json")
    assert result["provenance"]["params"]["device"] == "cpu"  # injected: the notebook's own default is "auto"
    finding = result["values"]["finding"]
    words = re.sub(r"<[^>]+>|`", "", (house.html / "index.html").read_text(encoding="utf-8"))
    assert finding.replace("`", "")[:60] in re.sub(r"\s+", " ", words)


def test_progress_goes_to_the_terminal_and_not_into_the_notebooks(house):
    lines = [line for line in house.first.stdout.splitlines() if re.search(r"01_mnist_cifar10: run \d", line)]
    # two epochs of two networks alone in three rows, three fine-tunings of one, and five pairs
    assert len(lines) == 3 * 2 * 2 + 3 + 5 * 2 and all("min left" in line for line in lines)
    for name in NOTEBOOKS[1:]:
        texts = [o for c in house.notebook(name).cells for o in c.get("outputs", []) if o.output_type == "stream"]
        assert texts == []


def test_what_is_published_is_notebooks_and_results_and_nothing_of_the_runners_own(house):
    names = {path.name for path in run._made(house.results)}
    assert names == {f"{name}.ipynb" for name in NOTEBOOKS} | {f"{name}.json" for name in NOTEBOOKS[1:]}
    assert (house.results / f"{NOTEBOOKS[1]}.stamp.json").exists()


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
        assert "synthetic stand-in" in page.read_text(encoding="utf-8"), page.name


def test_nothing_changed_means_nothing_is_done_not_even_after_a_touch(house):
    for name in NOTEBOOKS:
        (house.path / "notebooks" / f"{name}.py").touch()
    again = house.run("all", "--profile", "smoke", "--device", "cpu")
    assert again.returncode == 0
    assert again.stdout.splitlines()[:-1] == [*(f"{name}: up to date" for name in NOTEBOOKS), "book: up to date"]


def test_an_edited_notebook_runs_again_alone_and_trains_nothing(house):
    old = house.edit("notebooks/01_mnist_cifar10.py", "The question as it was asked", "The question as it was put")
    done = house.run("all", "--profile", "smoke", "--device", "cpu")
    (house.path / "notebooks" / "01_mnist_cifar10.py").write_text(old, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "01_mnist_cifar10: done" in said and "min left" not in said
    assert all(f"{name}: up to date" in said for name in NOTEBOOKS if name != "01_mnist_cifar10")
    assert "The question as it was put" in (house.html / "notebooks" / "01_mnist_cifar10.html").read_text(
        encoding="utf-8"
    )


def test_edited_prose_rebuilds_the_book_only(house):
    house.run("all", "--profile", "smoke", "--device", "cpu")
    old = house.edit("book/reproduce.md", "\n\n", "\n\nA new line of prose.\n\n")
    done = house.run("all", "--profile", "smoke", "--device", "cpu")
    (house.path / "book" / "reproduce.md").write_text(old, encoding="utf-8")
    assert all(f"{name}: up to date" in done.stdout for name in NOTEBOOKS) and "book: up to date" not in done.stdout
    assert "A new line of prose." in (house.html / "reproduce.html").read_text(encoding="utf-8")


def test_an_edited_library_runs_again_what_it_affects(house, monkeypatch):
    p = params.read("smoke", {"device": "cpu"})
    sources = {name: (ROOT / "notebooks" / f"{name}.py").read_text(encoding="utf-8") for name in NOTEBOOKS}
    assert "plots" in cache.imported_modules(sources["01_mnist_cifar10"])
    real = cache.source_digest

    def edited(module):
        monkeypatch.setattr(cache, "source_digest", lambda *m: real(*m) + ("x" if module in _closure(m) else ""))
        return {name for name in NOTEBOOKS if run._stamp(name, p) != before[name]}

    def _closure(modules):
        seen, todo = set(), set(modules)
        while todo:
            name = todo.pop()
            seen.add(name)
            todo |= cache.imported_modules((cache.PACKAGE / f"{name}.py").read_text(encoding="utf-8")) - seen
        return seen

    before = {name: run._stamp(name, p) for name in NOTEBOOKS}
    assert edited("plots") == set(NOTEBOOKS[1:])
    assert edited("weights") == set(NOTEBOOKS)
    assert edited("run") == set()


def test_docstrings_and_comments_are_not_code():
    a = 'def f():\n    """A docstring."""\n    return 1  # why\n'
    assert cache._code_only(a) == cache._code_only('def f():\n    """Another."""\n    return 1\n')
    assert cache._code_only(a) != cache._code_only(a.replace("1", "2"))


def test_a_failing_notebook_shows_its_traceback_and_the_others_still_run(house):
    old = house.edit(
        "notebooks/02_svhn_cifar10.py", "\nfinding = results", "\nraise KeyError('planted')\nfinding = results"
    )
    failed = house.run("all", "--profile", "smoke", "--device", "cpu")
    assert failed.returncode != 0
    assert "02_svhn_cifar10: FAILED" in failed.stderr and "KeyError: 'planted'" in failed.stderr
    assert "03_mnist_svhn: up to date" in failed.stdout or "03_mnist_svhn: done" in failed.stdout
    page = (house.html / "notebooks" / "02_svhn_cifar10.html").read_text(encoding="utf-8")
    assert "planted" in page and "Traceback" in page
    assert not (house.results / "02_svhn_cifar10.json").exists()  # no number of a failed page survives
    assert "planted" in house.run("notebooks", "--profile", "smoke", "--device", "cpu").stderr  # it is tried again
    (house.path / "notebooks" / "02_svhn_cifar10.py").write_text(old, encoding="utf-8")
    mended = house.run("all", "--profile", "smoke", "--device", "cpu")
    assert mended.returncode == 0 and "min left" not in mended.stdout, mended.stderr
    assert not [p for p in house.results.iterdir() if p.name.startswith(".")]  # nothing is left half written


def test_a_missing_number_stops_the_build_and_is_named(house):
    old = house.edit("book/index.md", "`01_mnist_cifar10:finding`", "`01_mnist_cifar10:fnding`")
    failed = house.run("book", "--profile", "smoke")
    (house.path / "book" / "index.md").write_text(old, encoding="utf-8")
    assert failed.returncode == 2 and "fnding" in failed.stderr and "finding" in failed.stderr


def test_wrong_parameters_stop_before_anything_runs(house):
    old = house.edit("params/smoke.yaml", "epochs: 2", "epocs: 2")
    failed = house.run("all", "--profile", "smoke")
    (house.path / "params" / "smoke.yaml").write_text(old, encoding="utf-8")
    assert failed.returncode == 2 and failed.stdout == ""
    assert "params/smoke.yaml: unknown parameter 'epocs'; did you mean 'epochs'?" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all", "--profile", "full"], "no GPU here"),
        (["all", "--profile", "published"], "make book PROFILE=published"),
        (["all", "--profile", "smoke", "--seeds", "two"], "SEEDS must be a number"),
        (["book", "--profile", "quick"], "make all PROFILE=quick"),
        (["book", "--profile", "nope"], "no parameter file params/nope.yaml"),
    ],
)
def test_what_cannot_be_run_stops_at_once_and_says_what_to_do(house, arguments, message):
    failed = house.run(*arguments)
    assert failed.returncode == 2 and message in failed.stderr and failed.stdout == ""


def test_a_dataset_that_is_neither_there_nor_allowed_stops_at_once(house, tmp_path):
    old = house.edit("params/smoke.yaml", "allow_standin: [mnist, cifar10, svhn]", "allow_standin: [mnist, cifar10]")
    failed = house.run("all", "--profile", "smoke")
    (house.path / "params" / "smoke.yaml").write_text(old, encoding="utf-8")
    assert failed.returncode == 2 and "no SVHN" in failed.stderr and "allow_standin: [svhn]" in failed.stderr


def test_a_removed_page_is_made_again_and_an_unclean_run_is_not_published(house, monkeypatch, capsys):
    """In this process, so that the coverage of the runner is measured."""
    for name, value in (("JUPYTER_PATH", ""), ("JUPYTER_PREFER_ENV_PATH", "1"), ("WEIGHTSUM_NO_DOWNLOAD", "")):
        monkeypatch.setenv(name, value)
    for name, path in (("ROOT", ""), ("NOTEBOOKS", "notebooks"), ("BOOK", "book"), ("PUBLISHED", "book/published")):
        monkeypatch.setattr(run, name, house.path / path)
    monkeypatch.setattr(params, "PARAMS_DIR", house.path / "params")
    monkeypatch.chdir(house.path)
    smoke = ["--profile", "smoke", "--device", "cpu"]
    (house.results / "00_how_to_sum.ipynb").unlink()
    assert run.main(["book", *smoke]) == 2
    assert "has no executed 00_how_to_sum; make them first: make all PROFILE=smoke" in capsys.readouterr().err
    assert run.main(["all", *smoke]) == 0
    said = capsys.readouterr().out
    assert "00_how_to_sum: done" in said and "03_mnist_svhn: up to date" in said
    assert (house.results / "00_how_to_sum.ipynb").exists()
    assert run.main(["publish", *smoke]) == 2
    assert "commit" in capsys.readouterr().err  # the copy is no checkout
    assert run.main(["publish", *smoke, "--seeds", "2"]) == 2
    assert "not of this code and these parameters" in capsys.readouterr().err
    # nothing but what the house began with
    assert {f.name for f in (house.path / "book" / "published").iterdir()} == {"bench.json", "bench.png"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_in_jupyterlab_with_its_default_parameters(house, name):
    """Cell by cell in the notebooks' folder, as JupyterLab does, without papermill."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(house.path / "notebooks" / f"{name}.py")
    client = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(house.path / "notebooks")}}, timeout=300
    )
    client.execute(env=house.environment | {"JUPYTER_PATH": "", "JUPYTER_PREFER_ENV_PATH": "1"})
    last = [o for c in notebook.cells for o in c.get("outputs", [])][-1]
    assert "data" in last


def test_the_notebooks_define_nothing_that_the_library_wants():
    for name in NOTEBOOKS[1:]:
        source = (ROOT / "notebooks" / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"^(def|class) ", source, re.M), name


def test_make_without_a_target_prints_the_targets():
    if not shutil.which("make"):
        pytest.skip("no make on this machine")
    said = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    for word in ("all", "test", "lab", "book", "PROFILE", "DATA_DIR", "SEEDS", "DEVICE"):
        assert re.search(rf"\b{word}\b", said), word
