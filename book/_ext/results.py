"""Sphinx extension: numbers, sentences and tables of the report come from ``<source>/results/<notebook>.json``.

- role ``{result}`NOTEBOOK:key` `` or ``{result}`NOTEBOOK:key|.1f` `` puts in a value, a string as inline markup;
- directive ``{result-table} NOTEBOOK:table`` (option ``caption``) puts in a table;
- of a dataclass whose docstring doesn't name its fields the library's page lists them, with the help that they carry.

What is missing is a warning that names the nearest known one, so that a build with ``-W`` fails, and shows in the page.
"""

import dataclasses
import difflib
import json
import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

logger = logging.getLogger(__name__)
# "98.2", "−0.3 %", "97.1 ± 0.4 (5)", "1,024 s": what a column of numbers holds
_NUMBER = re.compile(r"[+\-−±≥≤<>~≈]?\s*[\d.,]+(\s*([%×]|s|min|points))?(\s*[±/(–\[].*)?")
_EMPTY = {"", "-", "–", "—", "−"}


class MissingResultError(LookupError):
    """A result that the report asks for and no notebook has written."""


def look_up(env, reference: str, section: str):
    """The entry of a results file.

    Args:
        env: Sphinx's build environment; the current page is made to depend on the file.
        reference: ``NOTEBOOK:key``.
        section: "values" or "tables".

    Raises:
        MissingResultError: no such file or key; says which are nearest.
    """
    notebook, _, key = (part.strip() for part in reference.partition(":"))
    folder = Path(env.srcdir) / "results"
    path = folder / f"{notebook}.json"
    env.note_dependency(str(path))
    if not path.is_file():
        notebooks = [p.stem for p in folder.glob("*.json")]
        raise MissingResultError(f"no results/{notebook}.json; {_nearest(notebook, notebooks)}")
    try:
        known = json.loads(path.read_text(encoding="utf-8")).get(section, {})
    except ValueError as error:
        raise MissingResultError(f"results/{notebook}.json is not JSON ({error})") from error
    if key not in known:
        raise MissingResultError(f"no '{key}' among the {section} of results/{notebook}.json; {_nearest(key, known)}")
    return known[key]


def _nearest(key: str, known) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0)
    return f"the nearest is '{near[0]}'" if near else "there are none"


def _as_text(inline):
    """Parsed inline markup in which HTML is what it says: a name in a result may be anybody's."""
    box = nodes.inline("", "", *inline)
    for raw in list(box.findall(nodes.raw)):
        raw.parent.replace(raw, nodes.Text(raw.astext()))
    return box.children


def _with_minus(number: str) -> str:
    return "−" + number[1:] if number.startswith("-") else number


class Result(SphinxRole):
    """Role ``{result}`NOTEBOOK:key|format` ``."""

    def run(self):
        """Return the value as text, or as parsed inline markup where it is a string."""
        reference, _, form = self.text.partition("|")
        try:
            value = look_up(self.env, reference, "values")
            text = format(value, form.strip())
        except (MissingResultError, TypeError, ValueError) as error:
            reason = error if isinstance(error, MissingResultError) else f"format '{form}': {error}"
            logger.warning("result '%s': %s", self.text, reason, location=self.get_location())
            return [nodes.inline("", f"missing: {self.text}", classes=["missing-result"])], []
        if not isinstance(value, str):
            return [nodes.Text(_with_minus(text))], []
        inline, messages = self.inliner.parse(text, self.lineno, self.inliner, self.inliner.parent)
        return _as_text(inline), messages


class ResultTable(SphinxDirective):
    """Directive ``{result-table} NOTEBOOK:table``."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"caption": directives.unchanged}  # noqa: RUF012 (docutils' own interface)

    def run(self):
        """Return the table: columns of numbers to the right, the others to the left."""
        try:
            content = look_up(self.env, self.arguments[0], "tables")
        except MissingResultError as error:
            logger.warning("result-table '%s': %s", self.arguments[0], error, location=self.get_location())
            return [nodes.paragraph("", f"missing: {self.arguments[0]}", classes=["missing-result"])]
        columns, rows = content["columns"], [[str(cell).strip() for cell in row] for row in content["rows"]]
        cells = [[row[i] for row in rows if row[i] not in _EMPTY] for i in range(len(columns))]
        numeric = [i > 0 and bool(c) and all(map(_NUMBER.fullmatch, c)) for i, c in enumerate(cells)]
        group = nodes.tgroup(cols=len(columns))
        group += [nodes.colspec(colwidth=1) for _ in columns]
        group += nodes.thead("", self._row(columns, numeric))
        group += nodes.tbody("", *(self._row(row, numeric) for row in rows))
        table = nodes.table("", group, classes=["result-table"])
        if "caption" in self.options:
            table.insert(0, nodes.title("", "", *self.state.inline_text(self.options["caption"], self.lineno)[0]))
        self.set_source_info(table)
        return [table]

    def _row(self, cells, numeric):
        row = nodes.row()
        for cell, number in zip(cells, numeric, strict=True):
            inline = self.state.inline_text(_with_minus(cell) if number else cell, self.lineno)[0]
            row += nodes.entry("", nodes.paragraph("", "", *_as_text(inline)), classes=["number" if number else "text"])
        return row


def list_fields(app, what, name, obj, options, lines):
    """Put the fields of a dataclass below its docstring (``autodoc-process-docstring``, after napoleon)."""
    named = any(line.startswith((":param", ":ivar")) for line in lines)
    if named or what != "class" or not dataclasses.is_dataclass(obj):
        return
    lines.append("")
    for field in dataclasses.fields(obj):
        kind = getattr(field.type, "__name__", str(field.type))
        said = [field.metadata["help"], *filter(None, [field.metadata["rule"][1]])] if field.metadata else []
        default = [] if field.default is dataclasses.MISSING else [f"default ``{field.default!r}``"]
        lines.append(f":ivar {field.name}: ``{kind}``; {'; '.join([*said, *default])}".rstrip("; "))


def setup(app):
    """Register the role, the directive and the lists of fields."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", list_fields, priority=900)
    app.add_role("result", Result())
    app.add_directive("result-table", ResultTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
