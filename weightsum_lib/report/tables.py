"""Intervals over seeds, the long frame made wide and summarized, and the JSON files that the book reads.

A *summary* is a DataFrame with a row a method (and policy, and tested task) whose cells are :class:`Interval`.
"""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from scipy import special, stats

from weightsum_lib.study import store
from weightsum_lib.study.params import CLAIMS, DATASETS, slug

pd.set_option("styler.format.escape", "html")  # a row may be called anything
# role of a network where a task is tested; "before" and "other" follow from what is tested
_ROLES = {"sum": "after", "merged": "after", "ceiling": "after", "renamed": "renamed", "ensemble": "ensemble"}
_OF_SUM = ["policy", "share", "narrow", "draw"]  # levels in which a sum differs from what it is compared with
_PERCENT = ["before", "after", "other", "ensemble", "renamed", "confidence"]  # intervals inside 0 to 100
HEADINGS = {  # of levels and columns; what is not here is written as it is called
    "third": "The third network",
    "networks": "Networks that are summed",
    "share": "k",
    "before": "Before the sum (%)",
    "after": "After the sum (%)",
    "gap": "Gap (points)",
    "kept": "Kept (%)",
    "kept_of_ensemble": "Kept of the ensemble (%)",
    "ensemble": "Ensemble of logits (%)",
    "other": "Control: the other network alone (%)",
    "renamed": "Control: classes renamed (%)",
    "loudness": "Lost to loudness (points)",
    "interference": "Lost to interference (points)",
    "confidence": "The other network's confidence (%)",
    "gap_full": "Below independent (points)",
    "gap_size": "Below its size (points)",
    "worst": "Kept in the worst draw (%)",
    "spread": "Spread of kept over draws (points)",
    "sampling": "Standard error of the test set (points)",
    "difference": "Kept, difference to the first row (points)",
}


_TO = "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}"  # a line breaks before an interval, not inside it


class Interval(NamedTuple):
    """A mean over ``n`` seeds, and the ends of its 95 % interval; None with one seed.

    >>> print(Interval(-97.25, None, None, 1))
    −97.2
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    def __format__(self, digits: str) -> str:
        numbers = [self.mean] if self.low is None else self[:3]
        mean, *ends = (format(number, f"z{digits or '.1f'}").replace("-", "−") for number in numbers)
        return f"{mean} ({_TO.join(ends)})" if ends else mean

    def __str__(self) -> str:
        return format(self)


def interval(values: Iterable[float], percent: bool = False) -> Interval | None:
    """The :class:`Interval` of some values, one a seed; what is nan doesn't count. None without any value.

    Student's t; of a percentage on the logit scale, so that the interval stays inside 0 to 100. (A bootstrap of three
    seeds would be too narrow.)

    >>> interval([97.0, 98.0, 99.0], percent=True)  # doctest: +ELLIPSIS
    Interval(mean=98.0, low=92.97..., high=99.54..., n=3)
    """
    found = pd.Series(values, dtype=float).dropna()
    n, mean = len(found), float(found.mean())
    if n < 2:
        return Interval(mean, None, None, n) if n else None
    scaled = special.logit(found.clip(0.01, 99.99) / 100) if percent else found
    ends = scaled.mean() + np.array([-1, 1]) * stats.t.ppf(0.975, n - 1) * scaled.sem()
    return Interval(mean, *(100 * special.expit(ends) if percent else ends).tolist(), n)


def fraction(share: float) -> str:
    """A share k as it is written: 1/8; what is no such share, as a number.

    >>> fraction(0.125), fraction(1.0)
    ('1/8', '1')
    """
    return f"1/{1 / share:g}" if 0 < share < 1 else f"{share:g}"


def span(values: Iterable[float], digits: str = ".2f") -> str:
    """From the lowest to the highest value, once where both read the same.

    >>> span([1.5, 1.0, 2.0], ".1f"), span([1.001, 1.002])
    ('1.0 to 2.0', '1.00')
    """
    return " to ".join(dict.fromkeys(format(end, digits) for end in (min(values), max(values)))).replace("-", "−")


def title(name: str) -> str:
    """A dataset's name as the report prints it.

    >>> title("svhn inverted")
    'SVHN inverted'
    """
    return " ".join(DATASETS.get(word, word) for word in name.split(" "))


def wide(frame: pd.DataFrame) -> pd.DataFrame:
    """The long frame with a row for each sum on each tested task, and what it is compared with beside it, in percent.

    Columns: ``after``, the sum, with the standard error of its ``sampling`` and how many of the tested task's channels
    are ``shared``; the sum with ``renamed`` classes; and ``before``, the task's own network alone; ``other``, the other
    task's network there (the best of several), the control, with its ``confidence``; the ``ensemble`` of logits: under
    their own statistics, but beside a sum whose statistics are ``summed`` under those of training, which these add up.
    And from them ``gap`` = before − after, ``kept`` = 100 · after / before, ``kept_of_ensemble`` = 100 · after /
    ensemble, and where the accuracy is lost: ``loudness`` = before − ensemble, ``interference`` = ensemble − after.
    What was not measured is nan.

    Args:
        frame: see :mod:`weightsum_lib.study.measure`; further columns become levels of the index.
    """
    alone = frame["network"] == frame["tested"]
    roles = frame["network"].map(_ROLES).fillna(alone.map({True: "before", False: "other"}))
    frame = frame.assign(role=roles, as_trained=frame["policy"] == "summed")
    by = [c for c in frame if c not in ("network", "role", "accuracy", "confidence", "sampling", "shared")]
    found = pd.DataFrame(index=frame[frame["role"] == "after"].set_index(by).index.unique())
    parts = {role: (role, "accuracy") for role in ("before", "after", "other", "ensemble", "renamed")}
    parts |= {"confidence": ("other", "confidence"), "sampling": ("after", "sampling"), "shared": ("after", "shared")}
    for name, (role, column) in parts.items():
        levels = by if role in ("after", "renamed") else [level for level in by if level not in _OF_SUM]
        cells = frame[frame["role"] == role].groupby(levels, sort=False)[column].max()
        found = found.join(cells.rename(name), on=levels)
    found = found.droplevel("as_trained")
    return found.assign(
        gap=found["before"] - found["after"],
        kept=100 * found["after"] / found["before"].clip(lower=0.1),
        kept_of_ensemble=100 * found["after"] / found["ensemble"].clip(lower=0.1),
        loudness=found["before"] - found["ensemble"],
        interference=found["ensemble"] - found["after"],
    )


def summarize(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The summary of wide rows: each column's :class:`Interval` over seeds, and ``n``, the number of seeds.

    Of several draws of a seed the mean counts; beside it stand, of what is ``kept``, the ``worst`` draw of all and the
    ``spread``, the standard deviation of a pair's draws.

    Args:
        rows: as :func:`wide` gives them.
        by: the levels that stay apart.
    """
    seeds = rows.groupby([*by, "seed"], sort=False)
    groups = seeds.mean().groupby(list(by), sort=False)
    found = groups.agg({c: partial(interval, percent=c in _PERCENT) for c in rows}).assign(n=groups.size())
    if "kept" in rows:
        of_draws = {"worst": seeds["kept"].min().groupby(list(by)).min(), "sampling": groups["sampling"].mean()}
        found = found.assign(**of_draws, spread=seeds["kept"].std().groupby(list(by)).mean())
    return found


def paired(rows: pd.DataFrame, a: str, b: str, column: str) -> Interval | None:
    """The interval of a column's difference, method ``a`` minus method ``b``, over the seeds that both have."""
    by_seed = rows.groupby(["method", "seed"])[column].mean().unstack("method")
    return interval(by_seed[a] - by_seed[b])


def against(rows: pd.DataFrame, baseline: str, columns: Sequence[str]) -> pd.DataFrame:
    """The summary of some methods, each with the ``difference`` of what it keeps to a baseline, paired by seed."""
    found = summarize(rows, ["method", "tested"])[[*columns, "n"]]
    pairs = {at: paired(rows.xs(at[1], level="tested"), at[0], baseline, "kept") for at in found.index}
    return found.assign(difference=pd.Series(pairs))


def room_table(room: pd.DataFrame) -> pd.DataFrame:
    """The expected number of channels that two networks share, a line a layer, a column a share k; and the bytes.

    Args:
        room: see :func:`weightsum_lib.study.measure.room`.
    """
    layer = room["layer"].str.rpartition(".")[2] + " (" + room["channels"].astype(str) + ")"
    shown = room.assign(layer=layer).pivot(index="layer", columns="share", values="shared").loc[layer.unique()]
    shown.loc["Sum as its used channels (MiB)"] = room.groupby("share")["used"].first().div(2**20)
    shown = shown.sort_index(axis=1, ascending=False).rename(columns=lambda share: f"k = {fraction(share)}")
    return shown.map("{:,.4g}".format).rename_axis(index="Layer (channels)", columns=None).reset_index()


def price(rows: pd.DataFrame, twins: Mapping[str, str], full: str) -> pd.DataFrame:
    """What each network loses against dense ones that were trained alone, under statistics of its own task's images.

    Args:
        rows: task 3's, as :func:`wide` gives them.
        twins: a method to the row of networks of its size, trained alone.
        full: the row of dense networks of the profile's width, trained alone.

    Returns:
        wide rows with ``before`` (percent), ``gap_full`` and ``gap_size`` (points: the twin's accuracy minus the
        network's), for the seeds that the twins have too; ``gap_full`` is nan where the full row lacks one.
    """
    alone = rows["before"].xs("union", level="policy").groupby(["task", "seed", "tested", "method"], sort=False)
    alone = alone.first().unstack("method", sort=False)
    of_size = alone[[twins[method] for method in alone]].set_axis(alone.columns, axis=1)
    found = {"before": alone, "gap_full": -alone.sub(alone[full], axis=0), "gap_size": of_size - alone}
    return pd.DataFrame({n: e.stack("method", future_stack=True) for n, e in found.items()}).dropna(subset="gap_size")


def table(summary: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A summary as it is shown: its levels, some of its columns under their headings, and n, as text.

    Tested tasks stand side by side. Intervals have one decimal, gaps, which are small, two; what is missing is "–".
    """
    shown = {c: [_text(cell, ".2f" if c.startswith("gap") else ".1f") for cell in summary[c]] for c in columns}
    shown, n = pd.DataFrame(shown, summary.index).rename(columns=_heading), summary["n"]
    if "tested" in summary.index.names:
        shown = pd.concat({t: shown.xs(t, level="tested") for t in summary.index.unique("tested")}, axis=1).fillna("–")
        shown = shown.set_axis([f"{title(t)}: {heading[0].lower()}{heading[1:]}" for t, heading in shown], axis=1)
        n = n.groupby(shown.index.names).max()
    shown = shown.assign(n=n.astype(str))
    if "share" in shown.index.names:
        shown = shown.rename(index=fraction, level="share")
    return shown.rename_axis(index=[_heading(level) for level in shown.index.names]).reset_index()


def _heading(name: str) -> str:
    return HEADINGS.get(name, name.capitalize())


def _text(cell, digits: str) -> str:
    return cell if isinstance(cell, str) else "–" if cell is None or cell != cell else format(cell, digits)


def by_task(summary: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A :func:`table` of each tested task below that of another: narrower than side by side."""
    each = {title(n): table(summary.xs(n, level="tested"), columns) for n in summary.index.unique("tested")}
    return pd.concat(each, names=["Task"]).reset_index("Task")


def shown(frame: pd.DataFrame, caption: str = "", marked: Sequence[str] = ()) -> Styler:
    """A table in a notebook: without numbers of rows, and with those rows in bold of which a cell is ``marked``."""
    frame = frame.reset_index(drop=True)
    bold = frame.isin(marked).any(axis=1).map({True: "font-weight: bold", False: ""})
    return frame.style.hide(axis="index").set_caption(caption).apply(lambda column: bold)


def by_share(cells: pd.Series) -> pd.DataFrame:
    """Intervals by ``line`` and ``share`` as they are shown: a line a row, a share k of the sum's channels a column."""
    shown = cells.map(str).unstack("share", fill_value="–").loc[cells.index.unique("line")]
    shown = shown.sort_index(axis=1, ascending=False).rename(columns=lambda k: f"k = {fraction(k)}")
    return shown.rename_axis(index="Networks", columns=None).reset_index()


def layer_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Norm ratio and cosine, a line a method: median and range over the layers."""
    columns = {"norm_ratio": "Norm ratio: median (range)", "cosine": "Cosine: median (range)"}
    of_method = layers.groupby("method", sort=False)[list(columns)]
    found = of_method.agg(lambda of: f"{Interval(of.median(), of.min(), of.max(), len(of)):.2f}")
    return found.reset_index().rename(columns={"method": "Method", **columns})


def data_notice(described: Mapping[str, dict]) -> str:
    """Which data a page was made from, in one Markdown line.

    Args:
        described: a dataset's name to its :meth:`weightsum_lib.Dataset.describe`.
    """
    parts = []
    for name, d in described.items():
        note = f"; {html.escape(d['note'])}" if d["source"] == "real" else ""
        kind = "real" if note else "**synthetic stand-in**"
        parts.append(f"{title(name)}: {kind} ({d['images']['train']:,} training images{note})")
    warning = " Numbers on stand-ins show the method at work; they are not numbers of the real dataset."
    standin = any(d["source"] != "real" for d in described.values())
    return "**Data on this page.** " + ". ".join(parts) + "." + (warning if standin else "")


def headline(summary: pd.DataFrame, task: str) -> list[dict]:
    """A summary's rows for the front page: before, after, gap, and the controls, as far as there are any.

    Args:
        summary: by method and tested task; the rows of one tested task come after those of another.
        task: what the front page calls it, "Task 1".
    """
    return [
        {"task": f"{task}: {title(name)}", "method": method, "n": row["n"]}
        | {c: row[c] and row[c]._asdict() for c in ("before", "after", "gap", "kept", "other", "renamed")}
        for name in summary.index.unique("tested")
        for method, row in summary.xs(name, level="tested").iterrows()
    ]


def intervals_of(summary: pd.DataFrame) -> dict[str, Interval]:
    """The intervals of a summary by key, such as ``joint_ce.after_mnist``, with ``.1/8`` where there is a share k."""
    found = {}
    for _, row in summary.reset_index().iterrows():
        name = slug(row.get("line", row.get("third", row.get("method"))))
        at = f".{fraction(row['share'])}" if "share" in row else ""
        cells = {column: cell for column, cell in row.items() if isinstance(cell, Interval)}
        found |= {f"{name}.{column}_{row['tested']}{at}": cell for column, cell in cells.items()}
    return found


def as_json(frame: pd.DataFrame) -> dict:
    """A table as the book reads it: ``columns`` and ``rows`` of text."""
    return {"columns": list(frame.columns), "rows": frame.astype(str).values.tolist()}


def save(
    notebook: str,
    study,
    values: dict,
    tables: Mapping[str, pd.DataFrame],
    headline: Sequence[dict] = (),
    intervals: Mapping[str, Interval] | None = None,
    rows: pd.DataFrame | None = None,
) -> None:
    """Write ``<results_dir>/<profile>/<notebook>.json``, which the book reads.

    Args:
        notebook: name of the notebook.
        study: the :class:`weightsum_lib.Study` that made the results.
        values: key to number or text, for the prose.
        tables: name to table.
        headline: rows for the front page, see :func:`headline`.
        intervals: by key; their means are values too, and the claims of ``params/claims.yaml`` are held to them.
        rows: wide rows that intervals come from, with every seed and draw, so that anyone can check them.
    """
    profile, intervals = study.params.profile, intervals or {}
    content = {"notebook": notebook, "profile": profile, "headline": list(headline), "provenance": study.provenance()}
    content["claims"] = store.file_sha256(CLAIMS)  # that the run is held to
    content["values"] = {key: found.mean for key, found in intervals.items()} | values
    content["intervals"] = {key: found._asdict() for key, found in intervals.items()}
    content["tables"] = {name: as_json(frame) for name, frame in tables.items()}
    if rows is not None:
        shown = rows[["before", "after", "ensemble"]].round(3).reset_index()
        content["rows"] = json.loads(shown.to_json(orient="split", index=False))
    store.write_json(study.results / profile / f"{notebook}.json", content)
