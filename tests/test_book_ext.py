"""The book's own extension: what it puts into a page, and that a missing result can't pass unseen."""

import json
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

from weightsum_lib import Method

EXTENSION = Path(__file__).parent.parent / "book" / "_ext"
RESULTS = {
    "values": {
        "accuracy": 98.123,
        "gap": -0.25,
        "seeds": 3,
        "finding": "The sum **keeps** `ce` at $x^2$.",
    },
    "tables": {
        "headline": {
            "columns": ["Task", "Before (%)", "How"],
            "rows": [["one", "98.1 ± 0.2", "`ce`"], ["two", "-0.3", "3 times"], ["three", "–", ""]],
        }
    },
}


@pytest.fixture
def book(tmp_path):
    """A function that builds one Markdown page and returns its text, its HTML and Sphinx's warnings."""
    source = tmp_path / "source"
    (source / "results").mkdir(parents=True)
    (source / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(EXTENSION)!r})\n"
        "extensions = ['myst_parser', 'results']\nmyst_enable_extensions = ['dollarmath']\nhtml_theme = 'basic'\n"
    )
    (source / "results" / "01_x.json").write_text(json.dumps(RESULTS), encoding="utf-8")

    def build(page: str | None = None):
        if page is not None:
            (source / "index.md").write_text("# Page\n\n" + textwrap.dedent(page), encoding="utf-8")
        log = tmp_path / "warnings"
        with open(log, "w", encoding="utf-8") as warnings, patch_docutils(), docutils_namespace():
            app = Sphinx(
                source, source, tmp_path / "out", tmp_path / "trees", "html", status=None, warning=warnings,
                warningiserror=True, keep_going=True,
            )  # fmt: skip
            app.build()
        html = (tmp_path / "out" / "index.html").read_text(encoding="utf-8").partition('role="main"')[2]
        text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
        build.failed = app.statuscode != 0
        return text, html, re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8"))

    build.results = source / "results" / "01_x.json"
    return build


def test_a_value_is_formatted(book):
    text, _, warnings = book("It is {result}`01_x:accuracy|.1f` %, {result}`01_x:gap|.2f`, n = {result}`01_x:seeds`.")
    assert "It is 98.1 %, −0.25, n = 3." in text
    assert not warnings and not book.failed


def test_html_in_a_result_is_text_and_not_a_part_of_the_page(book):
    bad = "a <script>alert(1)</script> <b onclick='x'>b</b> | c & `<i>` &lt;u&gt;"
    table = {"columns": ["Row", bad], "rows": [[bad, "1"], ["two", bad]]}
    book.results.write_text(json.dumps({"values": {"name": bad}, "tables": {"t": table}}), encoding="utf-8")
    _, html, warnings = book("Of {result}`01_x:name`.\n\n```{result-table} 01_x:t\n```")
    assert not re.search(r"<script>alert|<b\b|<i\b|<u\b[^l]", html)
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4 and "&lt;b onclick=" in html
    assert not warnings and len(re.findall("<tr", html)) == 3


def test_a_sentence_is_parsed_as_inline_markup(book):
    _, html, warnings = book("{result}`01_x:finding`")
    assert "<strong>keeps</strong>" in html
    assert re.search(r"<code[^>]*><span class=\"pre\">ce</span></code>", html)
    assert re.search(r'<span class="math[^>]*>\\\(x\^2\\\)</span>', html)
    assert not warnings


def test_a_table_has_its_numbers_to_the_right(book):
    _, html, warnings = book("```{result-table} 01_x:headline\n:caption: What **it** shows\n```")
    assert "<strong>it</strong>" in html.partition("<caption>")[2].partition("</caption>")[0]
    cells = re.findall(r'<td class="(\w+)"><p>(.*?)</p></td>', html)
    assert [kind for kind, _ in cells] == ["text", "number", "text"] * 3
    assert [cell for kind, cell in cells if kind == "number"] == ["98.1 ± 0.2", "−0.3", "–"]
    assert re.findall(r'<th class="head (\w+)">', html) == ["text", "number", "text"]
    assert not warnings


@pytest.mark.parametrize(
    "page, says",
    [
        ("{result}`01_x:acuracy`", r"01_x:acuracy.*nearest is 'accuracy'"),
        ("{result}`01_y:accuracy`", r"no results/01_y\.json; the nearest is '01_x'"),
        ("{result}`01_x:finding|.1f`", r"01_x:finding.*format '\.1f'"),
        ("```{result-table} 01_x:headlines\n```", r"01_x:headlines.*nearest is 'headline'"),
        ("```{result-table} 02_z:headline\n```", r"no results/02_z\.json"),
    ],
)
def test_what_is_missing_fails_the_build_and_shows(book, page, says):
    text, _, warnings = book(page)
    assert re.search(says, warnings), warnings
    assert book.failed
    assert "missing: 0" in text


def test_a_damaged_file_fails_the_build(book):
    book.results.write_text('{"values": {"acc', encoding="utf-8")
    _, _, warnings = book("{result}`01_x:accuracy`")
    assert "01_x.json is not JSON" in warnings and book.failed


def test_a_page_is_built_again_when_its_results_change(book):
    book("{result}`01_x:seeds`")
    book.results.write_text(json.dumps({"values": {"seeds": 777}}), encoding="utf-8")
    text, _, _ = book()
    assert "777" in text


def test_the_fields_of_a_dataclass_are_listed_with_their_help_unless_its_docstring_names_them(monkeypatch):
    monkeypatch.syspath_prepend(str(EXTENSION))
    import results

    lines = ["One row."]
    results.list_fields(None, "class", "Method", Method, None, lines)
    (quiet,) = (line for line in lines if line.startswith(":ivar quiet:"))
    assert "how loudly each network" in quiet and "from 0 to 1000" in quiet and "default ``0.0``" in quiet
    assert sum(line.startswith(":ivar") for line in lines) == len(fields(Method))
    for what, obj, said in (("class", Method, [":param quiet: told"]), ("function", Method, []), ("class", dict, [])):
        told = list(said)
        results.list_fields(None, what, "", obj, None, told)
        assert told == said
