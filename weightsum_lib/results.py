"""Numbers with intervals, verdicts computed from them, and the JSON files that the report reads."""

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from weightsum_lib import cache
from weightsum_lib.params import DATASETS

KEEPS = "keeps the skill"
CHANCE = 10.0  # percent, ten classes
SPARSE = "random keys 1/16"  # the recipe of random keys in a wider sum: a row that only some profiles have


def interval(values: Sequence[float]) -> dict:
    """Mean and 95 % interval over seeds (Student's t).

    Returns:
        ``mean``, ``half`` = half the interval's length (None with one value: no interval), ``n``.

    >>> interval([97.0, 98.0, 99.0])["mean"]
    98.0
    """
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else None
    return {"mean": float(np.mean(values)), "half": None if half is None else float(half), "n": n}


def format_interval(of: dict, digits: int = 1) -> str:
    """A mean such as "97.3", or with its interval "97.3 ± 0.2"; a true minus sign, spaces that don't break.

    >>> format_interval({"mean": -97.25, "half": None, "n": 1})
    '−97.2'
    """
    text = f"{of['mean']:.{digits}f}".replace("-", "−")
    return text if of["half"] is None else f"{text}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{of['half']:.{digits}f}"


def summarize(rows: Iterable[dict], by: Sequence[str], columns: Sequence[str]) -> list[dict]:
    """One row a group, in order of appearance: the group's labels and each column's :func:`interval`.

    A column that a group lacks is None.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in by), []).append(row)
    return [
        {
            **dict(zip(by, labels, strict=True)),
            **{c: interval([r[c] for r in group]) if all(c in r for r in group) else None for c in columns},
            "n": len(group),
        }
        for labels, group in groups.items()
    ]


def paired_difference(rows: Sequence[dict], a: str, b: str, column: str) -> dict:
    """:func:`interval` of a column's difference, method ``a`` minus method ``b``, over the seeds that both have."""
    by_seed = [{r["seed"]: r[column] for r in rows if r["method"] == m} for m in (a, b)]
    return interval([by_seed[0][s] - by_seed[1][s] for s in by_seed[0] if s in by_seed[1]])


def with_gap(rows: Iterable[dict], before: str = "before", after: str = "after", suffix: str = "") -> list[dict]:
    """Add ``gap`` = before − after (points) and ``kept`` = after / before (percent) to every row, keys with suffix."""
    return [{**r, f"gap{suffix}": r[before] - r[after], f"kept{suffix}": 100 * r[after] / r[before]} for r in rows]


def counts(rows: Sequence[dict], method: str, baseline: str, margins: dict[str, float]) -> bool:
    """Whether a method counts: before the sum, no network of it is worse than the baseline's by more than a margin.

    Args:
        rows: one a method and seed.
        method: the method in question.
        baseline: the method of networks that were trained alone for as many steps.
        margins: column of an accuracy before the sum to the margin in points; compared on shared seeds.
    """
    return all(paired_difference(rows, method, baseline, c)["mean"] >= -within for c, within in margins.items())


def verdict(before: float, after: float) -> str:
    """What a sum does to a skill, in words: kept ≥ 99 % "keeps", ≥ 90 % "nearly keeps", else how much is left.

    A network less than 10 points above chance before the sum has no skill that could be kept.

    >>> verdict(98.5, 98.3), verdict(98.5, 12.0), verdict(11.0, 12.0)
    ('keeps the skill', 'loses the skill', 'had no skill to keep')
    """
    if before < CHANCE + 10:
        return "had no skill to keep"
    if after >= 0.99 * before:
        return KEEPS
    if after >= 0.90 * before:
        return "nearly keeps the skill"
    return "keeps a part of the skill" if after >= CHANCE + 0.25 * (before - CHANCE) else "loses the skill"


def finding(baseline: dict, trained: dict, difference: dict, counted: bool, task: str) -> str:
    """One plain sentence a method on what the sum does to a task.

    Args:
        baseline: the summarized row (``before``, ``after``, ``gap``) of networks that never met.
        trained: the row of the pair that was trained with the third term.
        difference: ``after`` of the trained pair minus that of the baseline (:func:`paired_difference`).
        counted: whether the trained pair counts (:func:`counts`).
        task: title of the tested task.
    """
    gap = trained["gap"]
    unsure = gap["half"] is not None and abs(gap["mean"]) <= gap["half"]
    apart = verdict(baseline["before"]["mean"], baseline["after"]["mean"])
    together = verdict(trained["before"]["mean"], trained["after"]["mean"]) + ("" if counted else _SACRIFICED)
    return (
        f"Trained together (`{trained['method']}`), {task} goes from {format_interval(trained['before'])} % before the "
        f"sum to {format_interval(trained['after'])} % after it (gap {format_interval(gap, 2)} points"
        f"{', not told from zero by its interval' if unsure else ''}; n = {trained['n']}): the sum {together}. Two "
        f"networks trained apart (`{baseline['method']}`) go from {format_interval(baseline['before'])} % to "
        f"{format_interval(baseline['after'])} %: their sum {apart}. The difference between the two sums: "
        f"{format_interval(difference)} points."
    )


_SACRIFICED = ", but its networks were already worse before the sum than those trained apart"


def finding_unmet(rows: dict[str, dict], counted: dict[str, bool], titles: dict[str, str]) -> str:
    """Plain sentences on sums of two networks that never met.

    Args:
        rows: the summarized rows to speak of, in order, by method: the baseline first (``policy``, ``n``, and
            ``before_``, ``after_``, ``kept_``, ``other_`` + dataset).
        counted: whether a method counts (:func:`counts`).
        titles: the two datasets' names to their titles.
    """
    first, second = titles

    def read(row, name):
        before, after, kept = (row[f"{kind}_{name}"] for kind in ("before", "after", "kept"))
        return (
            f"{format_interval(after)} % of {titles[name]} ({format_interval(before)} % before, kept "
            f"{format_interval(kept)} %; it {verdict(before['mean'], after['mean'])})"
        )

    parts = [
        f"`{method}` (policy `{row['policy']}`, n = {row['n']}): {read(row, first)} and {read(row, second)}"
        f"{'' if counted.get(method, True) else _SACRIFICED}"
        for method, row in rows.items()
    ]
    last = list(rows.values())[-1]
    other = [format_interval(last[f"other_{name}"]) for name in titles]
    return (
        f"What the sum of two networks that never met reads. {'. '.join(parts)}. "
        f"Control, of the last pair: alone, θ of {titles[second]} reads {other[0]} % of {titles[first]}, and "
        f"θ of {titles[first]} {other[1]} % of {titles[second]}."
    )


def finding_transfer(
    disjoint: dict, random: dict, redrawn: Sequence[dict], three: dict, met: dict, titles: dict, all_titles: dict
) -> str:
    """Plain sentences on what lets networks that never met be summed.

    Args:
        disjoint: the summarized row of disjoint keys (``policy``, ``n``, and ``kept_`` + dataset).
        random: that of random keys.
        redrawn: rows of random keys whose ``kept_`` + dataset are means over draws of the keys, with ``method``.
        three: that of a sum of three under disjoint keys, none of which has met another.
        met: the same with a third network that has met the images of the two tasks.
        titles: the two datasets' names to their titles.
        all_titles: the same for the three.
    """

    def kept(row, names):
        return ", ".join(f"{format_interval(row[f'kept_{n}'])} % of {title}" for n, title in names.items())

    def targets(row, names, wanted):
        missed = []
        for n, title in names.items():
            short = wanted - row[f"kept_{n}"]["mean"]
            if short > 0:
                missed.append(title + (" (inside its interval)" if short <= (row[f"kept_{n}"]["half"] or 0) else ""))
        return f"the aim of {wanted:g} % is " + (f"missed on {' and '.join(missed)}" if missed else "reached on all")

    means = [f"`{r['method']}` {kept(r, titles)} (n = {r['n']})" for r in redrawn]
    last = list(all_titles.values())[-1]
    return (
        f"Under disjoint keys the state dicts are added, buffers and all, and the sum keeps {kept(disjoint, titles)} "
        f"(policy `{disjoint['policy']}`, n = {disjoint['n']}; {targets(disjoint, titles, 99.5)}). "
        f"Under random keys, with nothing agreed, it keeps {kept(random, titles)} (policy `{random['policy']}`, "
        f"n = {random['n']}; {targets(random, titles, 98)}). "
        f"That is one draw of the keys; averaged over several: {'; '.join(means)}. "
        f"Three networks under disjoint keys, none of which has met another, keep {kept(three, all_titles)} "
        f"(n = {three['n']}; {targets(three, all_titles, 98)}); with a {last} network that has "
        f"met the images of both tasks, {kept(met, all_titles)} (n = {met['n']}; {targets(met, all_titles, 98)})."
    )


def switch_table(methods: dict[str, dict]) -> pd.DataFrame:
    """The switches of some rows of the report as they stand in the parameter file, in words."""
    shown = {
        m: ", ".join(k if v is True else f"{k} {v}" for k, v in s.items() if k != "seeds") for m, s in methods.items()
    }
    return pd.DataFrame({"Method": shown.keys(), "Switches": shown.values()})


def loss_split(rows: Iterable[dict], names: Sequence[str]) -> list[dict]:
    """Where task 3's accuracy is lost, in points.

    ``loudness_`` + dataset = before − ensemble of logits; ``interference_`` + dataset = ensemble − sum of weights.
    """
    return [
        {
            **row,
            **{f"loudness_{n}": row[f"before_{n}"] - row[f"ensemble_{n}"] for n in names},
            **{f"interference_{n}": row[f"ensemble_{n}"] - row[f"after_{n}"] for n in names},
        }
        for row in rows
    ]


def price(rows: Iterable[dict], same_size: dict[str, str], full: str, names: Sequence[str]) -> list[dict]:
    """What each network loses against dense ones that were trained alone, in points, under their own statistics.

    Args:
        rows: task 3's, with ``method``, ``policy``, ``seed`` and ``before_`` + dataset.
        same_size: a method's label to that of the row with networks of its size, trained alone.
        full: label of the row with networks of full width, trained alone.
        names: the datasets.

    Returns:
        a dict for each method and seed for which both twins are there: ``before_`` + dataset, ``gap_full_`` +
        dataset and ``gap_size_`` + dataset (the twin's accuracy minus the network's).
    """
    alone = {(row["method"], row["seed"]): row for row in rows if row["policy"] == "per_task"}
    priced = []
    for (method, seed), row in alone.items():
        twins = {kind: alone.get((m, seed)) for kind, m in (("full", full), ("size", same_size[method]))}
        if all(twins.values()):
            gaps = {
                f"gap_{kind}_{n}": twin[f"before_{n}"] - row[f"before_{n}"]
                for kind, twin in twins.items()
                for n in names
            }
            priced.append(
                {"method": method, "seed": seed, **{f"before_{n}": row[f"before_{n}"] for n in names}, **gaps}
            )
    return priced


def headline_row(row: dict, task: str, networks: str, control: dict, suffix: str = "") -> dict:
    """A summarized row for the front page.

    Args:
        row: with ``method``, ``n`` and ``before``, ``after``, ``gap`` + suffix.
        task: what is tested.
        networks: what is summed.
        control: accuracy of the *other* network, alone, on this task.
        suffix: of the row's keys.
    """
    columns = {c: row[f"{c}{suffix}"] for c in ("before", "after", "gap")}
    shown = {"task": task, "method": row["method"], "networks": f"{networks}, {row['method']}"}
    return {**shown, **columns, "control": control, "n": row["n"]}


def layer_table(rows: Sequence[dict]) -> pd.DataFrame:
    """Norm ratio and cosine, a line a method: median and range over the layers."""
    methods = dict.fromkeys(row["method"] for row in rows)
    out = []
    for method in methods:
        line = {"Method": method}
        for key, title in (("norm_ratio", "Norm ratio: median (range)"), ("cosine", "Cosine: median (range)")):
            values = [row[key] for row in rows if row["method"] == method]
            line[title] = f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        out.append(line)
    return pd.DataFrame(out)


def unmet_table(rows: Sequence[dict], name: str) -> pd.DataFrame:
    """Task 3's table for one of its two tasks, the ceiling and the controls beside the sum."""
    columns = {
        "method": "Method",
        "policy": "Policy",
        f"before_{name}": "Before (%)",
        f"ensemble_{name}": "Ensemble of logits (%)",
        f"after_{name}": "The sum (%)",
        f"kept_{name}": "Kept (%)",
        f"other_{name}": "Control: other network alone (%)",
        f"renamed_{name}": "Control: SVHN's classes renamed (%)",
        "n": "n",
    }
    return table(rows, columns)


def table(rows: Sequence[dict], columns: dict[str, str]) -> pd.DataFrame:
    """A table to show: the given columns of summarized rows under their titles, intervals written out.

    One decimal; gaps, which are small, get two.
    """

    def show(name, value):
        if value is None:
            return "–"
        return format_interval(value, 2 if name.startswith("gap") else 1) if isinstance(value, dict) else value

    return pd.DataFrame({title: [show(name, row.get(name)) for row in rows] for name, title in columns.items()})


def data_notice(described: dict[str, dict]) -> str:
    """Which data a page was made from, in one Markdown line; ``described`` maps a name to ``Dataset.describe()``."""
    parts = []
    for name, d in described.items():
        kind = "**synthetic stand-in**" if d["source"] == "stand-in" else "real"
        note = "" if d["source"] == "stand-in" else f"; {d['note']}"
        parts.append(f"{DATASETS[name]}: {kind} ({d['images']['train']:,} training images{note})")
    warning = ""
    if any(d["source"] == "stand-in" for d in described.values()):
        warning = " Numbers on stand-ins show the method at work; they are not numbers of the real dataset."
    return "**Data on this page.** " + ". ".join(parts) + "." + warning


def provenance(study) -> dict:
    """What made a result: parameters, data, device, versions, commit, and the seconds that it took."""
    import torch

    gpu = torch.cuda.get_device_name(study.device) if study.device.type == "cuda" else None
    return {
        "params": study.params.as_dict(),
        "data": study.describe_data(),
        "device": gpu or f"CPU, {torch.get_num_threads()} threads",
        "precision": study.precision,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "torchvision", "numpy")}},
        "commit": study.commit,
        "training_seconds": study.training_seconds(),
        "measuring_seconds": study.measuring_seconds(),
    }


def as_json_table(frame: pd.DataFrame) -> dict:
    """A table as the report reads it: ``columns`` and ``rows`` of text."""
    return {"columns": list(frame.columns), "rows": frame.astype(str).values.tolist()}


def save(notebook: str, study, values: dict, tables: dict[str, pd.DataFrame], headline: Sequence[dict] = ()) -> Path:
    """Write ``<results_dir>/<profile>/<notebook>.json``, which the report reads; returns its path.

    Args:
        notebook: name of the notebook.
        study: the :class:`~weightsum_lib.study.Study` that made the results.
        values: key to number or text, for the prose.
        tables: name to table.
        headline: rows for the front page, see :func:`headline_row`.
    """
    content = {
        "notebook": notebook,
        "profile": study.params.profile,
        "values": values,
        "tables": {name: as_json_table(frame) for name, frame in tables.items()},
        "headline": list(headline),
        "provenance": provenance(study),
    }
    path = study.results / study.params.profile / f"{notebook}.json"
    cache.write_json(path, content)
    return path


def values_of(rows: Sequence[dict], columns: Sequence[str], prefix: str = "") -> dict[str, float]:
    """Flat keys for the prose, ``<prefix><method>.<column>``, with the mean of each summarized row."""
    return {
        f"{prefix}{row['method'].replace(' ', '_')}.{c}": row[c]["mean"] for row in rows for c in columns if row.get(c)
    }
