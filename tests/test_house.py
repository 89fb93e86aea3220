"""The plan of the house, over the syntax trees: which floor may import which, and how large each may be."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import jupytext
import pytest

from weightsum_lib.run import BOOK, NOTEBOOKS, notebook_names
from weightsum_lib.study import params
from weightsum_lib.study.store import PACKAGE

MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
MAY_NOT = {  # floor: what none of its modules imports
    "core": ("weightsum_lib.study", "weightsum_lib.report", "weightsum_lib.run", "weightsum_lib.bench"),
    "study": ("weightsum_lib.report", "weightsum_lib.run", "weightsum_lib.bench"),
    "report": (
        "torch", "torchvision", "safetensors.torch", "weightsum_lib.core", "weightsum_lib.run", "weightsum_lib.bench",
        *(f"weightsum_lib.{m}" for m in MODULES if m.startswith("study.") and m not in ("study.params", "study.store")),
    ),
}  # fmt: skip


def imports(tree):
    """The dotted names that a program imports, wherever it does, and what it imports from a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def lines_of_code(path):
    """Lines without docstrings, comments and blank lines."""
    source, lines = path.read_text(encoding="utf-8"), set()
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("floor", MAY_NOT)
def test_nothing_runs_back(floor):
    modules = [name for name in MODULES if name.startswith(f"{floor}.")]
    assert len(modules) >= 3
    for name in modules:
        for imported in imports(TREES[name]):
            wrong = [other for other in MAY_NOT[floor] if f"{imported}.".startswith(f"{other}.")]
            assert not wrong, f"{name} imports {imported}"


def test_each_import_within_the_package_is_one_that_a_digest_follows():
    """A digest of the code (weightsum_lib.study.store) sees `from weightsum_lib.floor import module`, and no other."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and name != "study.store":  # that one reads the list of exports
                assert not [a.name for a in node.names if a.name.split(".")[0] == "weightsum_lib"], name
            assert not (isinstance(node, ast.ImportFrom) and node.level), name


def test_what_make_and_the_report_load_does_without_torch():
    program = "import sys, weightsum_lib.run, weightsum_lib.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent).returncode == 0


def test_the_budget():
    lines = {name: lines_of_code(path) for name, path in MODULES.items() if path.name != "__init__.py"}
    assert {name: n for name, n in lines.items() if n > 300} == {}
    assert sum(lines.values()) <= 4638, lines


def test_the_notebooks_define_nothing_that_the_library_wants():
    for name in notebook_names():
        tree = ast.parse((NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8"))
        defined = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        shown = 1 if name.startswith("00") else 0  # the plain sum, to read
        assert len([n for n in defined if n in tree.body]) <= shown, name
        assert shown or not defined, name


def test_tasks_1_and_2_are_one_notebook_for_two_datasets():
    """All code cells are equal but one, which names the task and its datasets and does nothing else."""

    def code(name):
        return [cell.source for cell in jupytext.read(NOTEBOOKS / f"{name}.py").cells if cell.cell_type == "code"]

    first, second = code("01_mnist_cifar10"), code("02_svhn_cifar10")
    assert len(first) == len(second)
    differ = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
    assert len(differ) == 1
    for source in differ[0]:
        names, values = params._assignments(source)
        assert "MAIN" in names and values and names <= {"NOTEBOOK", "TASK", "MAIN", "SUPPORT"}


def test_a_line_of_code_is_counted_as_one(tmp_path):
    path = Path(tmp_path) / "x.py"
    path.write_text('"""Doc\nstring."""\n\n# why\nx = """a\nb"""  # two\n\n\ndef f():\n    """Doc."""\n    return 1\n')
    assert lines_of_code(path) == 4


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("How do I sum the weights?", "`WeightSum([a, b])`"),
        ("What about batch norm?", "running statistics are estimated anew, unless"),
        ("Multi-input network or weight sharing?", "a third network whose weights are a *function* of two others"),
        ("What is the third term?", "the simplest is the plain cross-entropy of the sum"),
        ("Is it meta-learning?", "a relative: it asks for weights that still work *after* a change of weights"),
        (
            "Is it a good idea?",
            "and may lose the other; one network trained on both tasks is simpler",
        ),
        ("Similar examples?", "bibliography below"),
    ],
)
def test_every_question_that_was_asked_is_answered_in_so_many_words(asked, answered):
    text = (NOTEBOOKS / "00_how_to_sum.py").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"# | {asked} |")]
    assert answered in row


def test_no_line_of_prose_is_taken_for_a_comment():
    """MyST leaves out, without a word, a line of Markdown that begins with %."""
    texts = {path.name: [path.read_text(encoding="utf-8")] for path in BOOK.glob("*.md")}
    for name in notebook_names():
        cells = jupytext.read(NOTEBOOKS / f"{name}.py").cells
        texts[name] = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert len(texts) > 10 and all(texts.values())
    lines = [(name, line) for name, of in texts.items() for text in of for line in text.splitlines()]
    assert not [at for at in lines if at[1].lstrip().startswith("%")]
