"""What the numbers say, computed from them: verdicts, what counts, and each page's sentences."""

from collections.abc import Mapping

import pandas as pd

from weightsum_lib.report.tables import Interval, paired, title
from weightsum_lib.study.params import BASELINE, TRAINED

CHANCE = 10.0  # percent, ten classes
KEEPS = "keeps the skill"
_SACRIFICED = ", but its networks were already worse before the sum than those trained apart"


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


def verdict_of(row: pd.Series) -> str:
    """The :func:`verdict` on a row of a summary."""
    return verdict(row["before"].mean, row["after"].mean)


def counts(rows: pd.DataFrame, method: str, baseline: str, margins: Mapping[str, float]) -> bool:
    """Whether a method counts: before the sum, no network of it is worse than the baseline's by more than a margin.

    Args:
        rows: wide rows of one policy (:func:`weightsum_lib.report.tables.wide`).
        method: the method in question.
        baseline: the method of networks that were trained alone for as many steps.
        margins: tested dataset to the margin in points; compared on shared seeds.
    """
    of_task = {name: paired(rows.xs(name, level="tested"), method, baseline, "before") for name in margins}
    return all(of_task[name].mean >= -margin for name, margin in margins.items())


def of_pair(summary: pd.DataFrame, difference: Interval, counted: bool, task: str) -> str:
    """What the sum does to the main task of a pair, in plain sentences.

    Args:
        summary: a row a method.
        difference: ``after`` of the pair trained together minus that of the pair trained apart, seed by seed.
        counted: whether the pair trained together :func:`counts`.
        task: title of the main task.
    """
    apart, together = summary.loc[BASELINE], summary.loc[TRAINED]
    gap = together["gap"]
    unsure = ", not told from zero by its interval" if gap.half is not None and abs(gap.mean) <= gap.half else ""
    return (
        f"Trained together (`{TRAINED}`), {task} goes from {together['before']} % before the sum to "
        f"{together['after']} % after it (gap {gap:.2f} points{unsure}; n = {together['n']}): the sum "
        f"{verdict_of(together)}{'' if counted else _SACRIFICED}. Two networks trained apart (`{BASELINE}`) go from "
        f"{apart['before']} % to {apart['after']} %: their sum {verdict_of(apart)}. The difference between the two "
        f"sums: {difference} points."
    )


def of_strangers(summary: pd.DataFrame, counted: Mapping[str, bool]) -> str:
    """What the sum of two networks that never met reads, in plain sentences.

    Args:
        summary: a row a method, policy and tested task, of the methods to speak of.
        counted: whether a method :func:`counts`; one that is left out does.
    """
    sentences = []
    for (method, policy), rows in summary.groupby(["method", "policy"], sort=False):
        read = [
            f"{row['after']} % of {title(name)} ({row['before']} % before, kept {row['kept']} %; it {verdict_of(row)})"
            for (_, _, name), row in rows.iterrows()
        ]
        sacrificed = "" if counted.get(method, True) else _SACRIFICED
        sentences.append(f"`{method}` (policy `{policy}`, n = {rows['n'].iloc[0]}): {' and '.join(read)}{sacrificed}")
    first, second = map(title, summary.index.unique("tested"))
    on_first, on_second = rows["other"]
    return (
        f"What the sum of two networks that never met reads. {'. '.join(sentences)}. Control, of the last pair: alone, "
        f"θ of {second} reads {on_first} % of {first}, and θ of {first} {on_second} % of {second}."
    )


def of_transfer(
    disjoint: pd.DataFrame, random: pd.DataFrame, redrawn: pd.DataFrame, three: pd.DataFrame, met: pd.DataFrame
) -> str:
    """What lets networks that never met be summed, in plain sentences; the arguments hold a row a tested task.

    Args:
        disjoint: disjoint keys.
        random: random keys, as they were drawn first.
        redrawn: means over draws of random keys, by method and tested task.
        three: a sum of three under disjoint keys, none of which has met another.
        met: the same with a third network that has met the images of the two others' tasks.
    """
    means = [f"`{method}` {_kept(rows.loc[method])}" for method, rows in redrawn.groupby("method", sort=False)]
    return (
        "Under disjoint keys the state dicts are added, buffers and all, and the sum keeps "
        f"{_kept(disjoint, 'owner', 99.5)}. Under random keys, with nothing agreed, it keeps "
        f"{_kept(random, 'union', 98)}. That is one draw of the keys; averaged over several: {'; '.join(means)}. Three "
        f"networks under disjoint keys, none of which has met another, keep {_kept(three, aim=98)}; with a "
        f"{title(met.index[-1])} network that has met the images of both tasks, {_kept(met, aim=98)}."
    )


def _kept(rows: pd.DataFrame, policy: str = "", aim: float = 0) -> str:
    """What a sum keeps of each task, under which policy, and whether that is as much as it should be."""
    short = {title(name): aim - cell.mean <= (cell.half or 0) for name, cell in rows["kept"].items() if cell.mean < aim}
    missed = " and ".join(name + (" (inside its interval)" if inside else "") for name, inside in short.items())
    parts = [f"policy `{policy}`, " * bool(policy) + f"n = {rows['n'].iloc[0]}"]
    if aim:
        parts.append(f"the aim of {aim:g} % is " + (f"missed on {missed}" if missed else "reached on all"))
    return ", ".join(f"{cell} % of {title(name)}" for name, cell in rows["kept"].items()) + f" ({'; '.join(parts)})"
