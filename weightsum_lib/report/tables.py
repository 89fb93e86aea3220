"""Intervals over seeds, the long frame made wide and summarized, and the JSON files that the book reads.

A *summary* is a DataFrame with a row a method (and policy, and tested task) whose cells are :class:`Interval`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from weightsum_lib.study import store
from weightsum_lib.study.params import DATASETS, Method, slug

_AFTER = {"sum": "after", "merged": "after", "ceiling": "after", "ensemble": "ensemble", "renamed": "renamed"}
_ROLES = ["before", "after", "other", "ensemble", "renamed"]  # of a network where a task is tested
HEADINGS = {  # of levels and columns; what is not here is written as it is called
    "third": "The third network",
    "networks": "Networks that are summed",
    "before": "Before the sum (%)",
    "after": "After the sum (%)",
    "gap": "Gap (points)",
    "kept": "Kept (%)",
    "ensemble": "Ensemble of logits (%)",
    "other": "Control: the other network alone (%)",
    "renamed": "Control: classes renamed (%)",
    "loudness": "Lost to loudness (points)",
    "interference": "Lost to interference (points)",
    "confidence": "The other network's confidence (%)",
    "gap_full": "Below full width (points)",
    "gap_size": "Below its size (points)",
}


class Interval(NamedTuple):
    """A mean over ``n`` seeds and half the length of its 95 % interval (Student's t), None with one seed.

    >>> print(Interval(-97.25, None, 1), f"{Interval(98.257, None, 1):.2f}")
    −97.2 98.26
    """

    mean: float
    half: float | None
    n: int

    def __format__(self, digits: str) -> str:
        mean, between = (
            format(self.mean, f"z{digits or '.1f'}").replace("-", "−"),
            "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}",
        )
        return mean if self.half is None else f"{mean}{between}{format(self.half, digits or '.1f')}"

    def __str__(self) -> str:
        return format(self)


def interval(values: Iterable[float]) -> Interval | None:
    """The :class:`Interval` of some values, one a seed; what is nan doesn't count. None without any value.

    >>> interval([97.0, 98.0, 99.0]).mean
    98.0
    """
    found = pd.Series(values, dtype=float).dropna()
    n = len(found)
    half = float(stats.t.ppf(0.975, n - 1) * found.std() / n**0.5) if n > 1 else None
    return Interval(float(found.mean()), half, n) if n else None


def title(name: str) -> str:
    """A dataset's name as the report prints it.

    >>> title("svhn inverted")
    'SVHN inverted'
    """
    return " ".join(DATASETS.get(word, word) for word in name.split(" "))


def wide(frame: pd.DataFrame, own: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The long frame with a row for each sum on each tested task, a column for each network beside it, in percent.

    Columns: ``before``, the task's own network alone; ``after``, the sum; ``other``, the other task's network there,
    the control, with its ``confidence``; the ``ensemble`` of logits; the sum with ``renamed`` classes. And from them
    ``gap`` = before − after, ``kept`` = 100 · after / before, and where the accuracy is lost: ``loudness`` =
    before − ensemble, ``interference`` = ensemble − after. What was not measured is nan.

    Args:
        frame: see :mod:`weightsum_lib.study.measure`; further columns become levels of the index.
        own: tested dataset to the network that was trained for it; by default they have the same name.
    """
    alone = frame["network"] == frame["tested"].replace(own or {})
    role = frame["network"].map(_AFTER).fillna(alone.map({True: "before", False: "other"}))
    by = [column for column in frame if column not in ("network", "accuracy", "confidence")]
    cells = frame.assign(role=role).set_index([*by, "role"])[["accuracy", "confidence"]].unstack("role", sort=False)
    found = cells["accuracy"].reindex(columns=_ROLES)
    found["confidence"] = cells["confidence"].get("other", np.nan)
    networks = ["before", "other", "confidence"]  # they are the same wherever a draw of the keys puts them
    same = [level for level in by if level != "draw"]
    found[networks] = found.groupby(same, sort=False)[networks].transform("first")
    return found.assign(
        gap=found["before"] - found["after"],
        kept=100 * found["after"] / found["before"].where(found["before"] > 0),
        loudness=found["before"] - found["ensemble"],
        interference=found["ensemble"] - found["after"],
    )


def summarize(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The summary of wide rows: each column's :class:`Interval` over seeds, and ``n``, the number of seeds.

    Args:
        rows: as :func:`wide` gives them. Several draws of one seed count as one, by their mean.
        by: the levels that stay apart.
    """
    groups = rows.groupby([*by, "seed"], sort=False).mean().groupby(list(by), sort=False)
    return groups.agg(interval).assign(n=groups.size())


def paired(rows: pd.DataFrame, a: str, b: str, column: str) -> Interval | None:
    """The interval of a column's difference, method ``a`` minus method ``b``, over the seeds that both have."""
    by_seed = rows.groupby(["method", "seed"])[column].mean().unstack("method")
    return interval(by_seed[a] - by_seed[b])


def price(rows: pd.DataFrame, twins: Mapping[str, str], full: str) -> pd.DataFrame:
    """What each network loses against dense ones that were trained alone, under the statistics of its own task.

    Args:
        rows: task 3's, as :func:`wide` gives them.
        twins: a method to the row of networks of its size, trained alone.
        full: the row of networks of full width, trained alone.

    Returns:
        wide rows with ``before`` (percent), ``gap_full`` and ``gap_size`` (points: the twin's accuracy minus the
        network's), for the seeds that the twins have too.
    """
    alone = rows.xs("per_task", level="policy")["before"].unstack("method", sort=False)
    of_size = alone[[twins[method] for method in alone]].set_axis(alone.columns, axis=1)
    found = {"before": alone, "gap_full": -alone.sub(alone[full], axis=0), "gap_size": of_size - alone}
    return pd.DataFrame({name: each.stack("method", future_stack=True) for name, each in found.items()}).dropna()


def same_recipe(methods: Mapping[str, Method], label: str) -> pd.DataFrame:
    """The rows whose switches differ from those of ``label`` in their widths (and seeds) only.

    Returns:
        a row a method: ``network_width`` and ``k``, the share of a network's channels that another has too. Ordered
        from small networks to large ones, and from much to little in common.
    """
    switches = pd.DataFrame({name: vars(method) for name, method in methods.items()}).T
    rest = switches.drop(columns=["network_width", "sum_width", "seeds"])
    found = switches[(rest == rest.loc[label]).all(axis=1)]
    found = found[["network_width"]].assign(k=found["network_width"] / found["sum_width"])
    return found.sort_values(["network_width", "k"], ascending=[True, False], kind="stable")


def table(summary: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A summary as it is shown: its levels, some of its columns under their headings, and n, as text.

    Tested tasks stand side by side. Intervals have one decimal, gaps, which are small, two; what is missing is "–".
    """

    def show(cell, digits):
        if isinstance(cell, Interval):
            return format(cell, digits)
        return "–" if pd.isna(cell) else cell if isinstance(cell, str) else f"{cell:g}"

    tested = summary.index.unique("tested") if "tested" in summary.index.names else [""]
    sides = {name: summary.xs(name, level="tested") if name else summary for name in tested}
    index = next(iter(sides.values())).index
    shown = index.to_frame(index=False).rename(columns=lambda level: HEADINGS.get(level, level.capitalize()))
    for name, side in sides.items():
        for column in columns:
            heading = HEADINGS.get(column, column.capitalize())
            heading = f"{title(name)}: {heading[0].lower()}{heading[1:]}" if name else heading
            digits = ".2f" if column.startswith("gap") else ".1f"
            shown[heading] = [show(cell, digits) for cell in side[column].reindex(index)]
    return shown.assign(n=[show(n, "") for n in summary["n"].groupby(index.names, sort=False).max()])


def layer_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Norm ratio and cosine, a line a method: median and range over the layers."""
    columns = {"norm_ratio": "Norm ratio: median (range)", "cosine": "Cosine: median (range)"}
    found = layers.groupby("method", sort=False)[list(columns)].agg(
        lambda values: f"{values.median():.2f} ({values.min():.2f} to {values.max():.2f})".replace("-", "−")
    )
    return found.reset_index().rename(columns={"method": "Method", **columns})


def switch_table(methods: Mapping[str, Method]) -> pd.DataFrame:
    """The switches of some rows that are not at their default, in words."""
    shown = {
        label: ", ".join(k if v is True else f"{k} {v}" for k, v in method.switches().items() if k != "seeds")
        for label, method in methods.items()
    }
    return pd.DataFrame(shown.items(), columns=["Method", "Switches"])


def data_notice(described: Mapping[str, dict]) -> str:
    """Which data a page was made from, in one Markdown line.

    Args:
        described: a dataset's name to its :meth:`weightsum_lib.Dataset.describe`.
    """
    parts = []
    for name, d in described.items():
        kind, note = ("real", f"; {d['note']}") if d["source"] == "real" else ("**synthetic stand-in**", "")
        parts.append(f"{title(name)}: {kind} ({d['images']['train']:,} training images{note})")
    warning = " Numbers on stand-ins show the method at work; they are not numbers of the real dataset."
    standin = any(d["source"] != "real" for d in described.values())
    return "**Data on this page.** " + ". ".join(parts) + "." + (warning if standin else "")


def headline(summary: pd.DataFrame, task: str, networks: str) -> list[dict]:
    """A summary's rows for the front page: before, after, gap, and the other network alone as ``control``.

    Args:
        summary: of one tested task, a row a method.
        task: what is tested.
        networks: what is summed.
    """
    shown = {"before": "before", "after": "after", "gap": "gap", "other": "control"}
    return [
        {"task": task, "method": row["method"], "networks": f"{networks}, {row['method']}", "n": row["n"]}
        | {new: row[old]._asdict() for old, new in shown.items()}
        for row in summary.reset_index().to_dict("records")
    ]


def values_of(summary: pd.DataFrame) -> dict[str, float]:
    """Keys for the prose, such as ``joint_ce.after_mnist``, with the mean of each interval of a summary."""
    return {
        f"{slug(row['method'])}.{column}_{row['tested']}": cell.mean
        for _, row in summary.reset_index().iterrows()
        for column, cell in row.items()
        if isinstance(cell, Interval)
    }


def as_json(frame: pd.DataFrame) -> dict:
    """A table as the book reads it: ``columns`` and ``rows`` of text."""
    return {"columns": list(frame.columns), "rows": frame.astype(str).values.tolist()}


def save(notebook: str, study, values: dict, tables: Mapping[str, pd.DataFrame], headline: Sequence[dict] = ()) -> Path:
    """Write ``<results_dir>/<profile>/<notebook>.json``, which the book reads; returns its path.

    Args:
        notebook: name of the notebook.
        study: the :class:`weightsum_lib.Study` that made the results.
        values: key to number or text, for the prose.
        tables: name to table.
        headline: rows for the front page, see :func:`headline`.
    """
    profile = study.params.profile
    content = {"notebook": notebook, "profile": profile, "values": values, "headline": list(headline)}
    content |= {"tables": {name: as_json(frame) for name, frame in tables.items()}, "provenance": study.provenance()}
    path = study.results / profile / f"{notebook}.json"
    store.write_json(path, content)
    return path
