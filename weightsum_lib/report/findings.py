"""What the numbers say, computed from them: verdicts by one rule, what counts, and each page's sentences."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize

from weightsum_lib.report.tables import Interval, fraction, paired, title
from weightsum_lib.study.params import ALONE, BASELINE, DISJOINT, RANDOM, TRAINED

CHANCE = 10.0  # percent, ten classes


def verdict(before: float, after: float) -> str:
    """What a sum does to a skill, in words: kept ≥ 99 % "keeps", ≥ 90 % "nearly keeps", else how much is left.

    A network less than 10 points above chance before the sum has no skill that could be kept.

    >>> verdict(98.5, 98.3), verdict(98.5, 12.0), verdict(11.0, 12.0)
    ('keeps the skill', 'loses the skill', 'had no skill to keep')
    """
    if before < CHANCE + 10:
        return "had no skill to keep"
    if after >= 0.99 * before:
        return "keeps the skill"
    if after >= 0.90 * before:
        return "nearly keeps the skill"
    return "keeps a part of the skill" if after >= CHANCE + 0.25 * (before - CHANCE) else "loses the skill"


def verdict_of(row: pd.Series) -> str:
    """The :func:`verdict` on a row of a summary; a skill that is lost once classes are ``renamed`` was not kept."""
    ends = [row[end] for end in ("after", "renamed") if isinstance(row.get(end), Interval)]
    said = [verdict(row["before"].mean, end.mean) for end in ends]
    return "loses the skill" if "loses the skill" in said else said[0]


def judge(found: Interval | None, at_least: float = -np.inf, at_most: float = np.inf) -> str:
    """Whether a quantity is so large, or so small: the whole interval must say so, or say not, else it is undecided.

    >>> [judge(Interval(99, low, high, 3), 98.5) for low, high in ((98.6, 99.4), (98.4, 99.6), (98, 98.4))]
    ['reached', 'undecided', 'missed']
    """
    if found is None or found.low is None or found.low < at_least <= found.high or found.low <= at_most < found.high:
        return "undecided"
    return "reached" if at_least <= found.low and found.high <= at_most else "missed"


def counts(rows: pd.DataFrame, method: str, baseline: str, margins: Mapping[str, float]) -> str:
    """Whether a method counts: before the sum, its networks are not inferior to the baseline's by more than a margin.

    Args:
        rows: wide rows (:func:`weightsum_lib.report.tables.wide`).
        method: the method in question.
        baseline: the method of networks that were trained alone for as many steps.
        margins: tested dataset to the margin in points; compared on shared seeds.

    Returns:
        "yes" where the 95 % interval of each difference lies above the margin, "no" where one lies below, else
        "undecided".
    """
    of_task = [(paired(rows.xs(name, level="tested"), method, baseline, "before"), m) for name, m in margins.items()]
    found = {judge(difference, -margin) for difference, margin in of_task}
    return "no" if "missed" in found else "undecided" if "undecided" in found else "yes"


def shares(rows: pd.DataFrame, what: str, task: str, method: str, named: bool = True) -> str:
    """What a method reads of each dataset, percent on average: "23.9 % of MNIST and 24.5 % of SVHN", or the numbers.

    Args:
        rows: of the front page, with ``task``, ``tested``, ``method``, ``before``, ``after`` and ``kept``.
        what: "before" or "after" the sum, or what is "kept" of the one in the other.
        task: how the names of the tasks begin, a pattern.
        method: the method.
        named: whether the datasets are.
    """
    of = rows[rows["task"].str.match(task) & (rows["method"] == method)]
    each = [f"{cell.mean:.1f}" + f" % of {name}" * named for cell, name in zip(of[what], of["tested"], strict=True)]
    return " and ".join(each) + " %" * (not named) if each else "–"


def answer(rows: pd.DataFrame, found: Mapping[str, dict]) -> tuple[str, str]:
    """The study's answer, in two sentences; of what sums it is, and what it costs.

    Args:
        rows: of the front page, see :func:`shares`.
        found: the results by notebook; those of task 1 say what becomes of CIFAR-10.
    """
    lost = found.get("01_mnist_cifar10", {}).get("values", {}).get("joint_ce.after_cifar10")
    lost = f" (of CIFAR-10 itself the sum of task 1 reads {lost:.0f} %, by chance 10)" if lost else ""
    apart, strangers = (shares(rows, "kept", task, BASELINE) for task in ("Task [12]", "Task 3"))
    paired, met_others = (shares(rows, "kept", task, TRAINED, named=False) for task in ("Task [12]", "Task 3"))
    plainly, recipe = (shares(rows, "kept", "Task 3", method, named=False) for method in (ALONE, RANDOM))
    alone, after = shares(rows, "before", "Task 3", BASELINE, named=False), shares(rows, "after", "Task 3", RANDOM)
    return (
        f"Added, two networks that were trained apart keep {apart}; trained to be added, {paired}. Two that never met "
        f"keep {strangers}; small and in random channels of a wide sum, {plainly}; trained for it by this study's "
        f"recipe, {recipe}.",
        f"The first are sums with a CIFAR-10 network{lost}, the others of an MNIST and an SVHN network: dense ones, "
        f"each trained to be added to a CIFAR-10 network, keep {met_others}. Batch norm is set on unlabelled images. "
        f"The recipe has a price: its sums read {after}, dense networks of the profile's width, each alone, {alone}. "
        "Who has both datasets can train one network on both instead.",
    )


def of_pair(summary: pd.DataFrame, rows: pd.DataFrame, counted: str, task: str) -> str:
    """What the sum does to the main task of a pair, in plain sentences.

    Args:
        summary: a row a method.
        rows: the wide rows that it is of.
        counted: whether the pair trained together :func:`counts`.
        task: title of the main task.
    """
    apart, together, first, tuned = summary.loc[BASELINE], summary.loc[TRAINED], "sequential, from the sum", ""
    if first in summary.index:
        more = [paired(rows, first, f"sequential, from {start}", "after") for start in ("θ_main", "random weights")]
        tuned = f" Fine-tuned for as many steps, that sum reads {summary['after'][first]} %: against its {task} "
        tuned += f"network fine-tuned alike that is {more[0]} points, against random weights {more[1]}."
    trained = "In the one seed, trained" if together["after"].n == 1 else "Trained"
    return (
        f"{trained} to be added, the sum {verdict_of(together)}: it reads {together['after']} % of {task}, where its "
        f"network alone reads {together['before']} % (are both networks as good before the sum as those trained alone? "
        f"{counted}). The sum of two that were trained apart {verdict_of(apart)}: {apart['after']} %.{tuned}"
    )


def of_strangers(summary: pd.DataFrame, counted: Mapping[str, str]) -> str:
    """What the sum of two networks that never met reads, in plain sentences.

    Args:
        summary: a row a method and tested task.
        counted: whether the networks of a method :func:`counts`.
    """
    ways = {
        BASELINE: "Of dense networks that were trained alone",
        TRAINED: "Of dense networks that were each trained to be added to a CIFAR-10 network",
        ALONE: "Under random keys of which the networks know nothing, small ones that were trained plainly",
        RANDOM: "Under such keys, trained by the recipe",
        DISJOINT: "Under disjoint keys, which are agreed on, the state dicts added as they are",
    }
    kept = " ".join(f"{words}, the sum keeps {of_each(summary.loc[way, 'kept'])}." for way, words in ways.items())
    apart, dense, keyed = (of_each(summary.loc[way, "renamed"]) for way in (BASELINE, TRAINED, RANDOM))
    worst = " and ".join(f"{least:.1f} % of {title(name)}" for name, least in summary.loc[RANDOM, "worst"].items())
    return (
        f"{kept} The worst draw of random keys for each task keeps {worst}. With the classes of SVHN renamed, so that "
        f"neither network helps the other, dense sums read {apart} if trained alone, {dense} if trained to be added, "
        f"those under random keys {keyed}. Are both networks as good before the sum as dense ones of their size "
        f"alone? By the recipe: {counted[RANDOM]}; under disjoint keys: {counted[DISJOINT]}."
    )


def of_recipe(recipe: pd.Series, plainly: pd.Series, shares: tuple[float, float], three: pd.Series) -> str:
    """What networks that never met keep under the recipe, and without it, in plain sentences.

    Args:
        recipe: intervals by share of the sum's keys and tested task.
        plainly: the same of networks that were trained plainly.
        shares: of the headline, and the smallest.
        three: intervals by tested task, of three networks under disjoint keys.
    """
    (dense, sparse), (at_dense, at_sparse) = map(fraction, shares), (of_each(recipe[share]) for share in shares)
    return (
        f"Trained by the recipe and added under random keys of {dense}, two networks that never met keep {at_dense}; "
        f"under keys of {sparse}, {at_sparse}. Networks that were trained plainly keep {of_each(plainly[shares[0]])}; "
        f"under keys of {sparse}, {of_each(plainly[shares[1]])}. Three networks under disjoint keys, none of which "
        f"has met another, keep {of_each(three)}."
    )


class Law(NamedTuple):
    """What N networks under random keys of k keep of the ensemble of their logits: 100 % · exp(−(scale · (N − 1) · k)
    ** power), in which (N − 1) · k is the expected number of other networks on a channel."""

    scale: float
    power: float

    def kept(self, networks, share):
        """In percent."""
        return 100 * np.exp(-((self.scale * (networks - 1) * share) ** self.power))

    def networks(self, share: float, kept: float) -> int:
        """How many networks fit if each is to keep so many percent."""
        return 1 + int((-np.log(kept / 100)) ** (1 / self.power) / self.scale / share)


def capacity(kept: pd.Series, fitted: Iterable[int]) -> tuple[Law, pd.DataFrame]:
    """Fit the :class:`Law` by least squares on sums of some numbers of networks, and hold all to it.

    Args:
        kept: percent of the ensemble that sums keep, by ``networks`` and ``share``.
        fitted: numbers of networks in the fit; the others are predicted.

    Returns:
        the law, and a table with a row a cell: measured, and by the law.
    """
    rows = kept.rename("measured").reset_index().sort_values(["networks", "share"])
    used = rows[rows["networks"].isin(list(fitted))]

    known = {"xdata": (used["networks"], used["share"]), "ydata": used["measured"], "bounds": (1e-6, 20)}
    best, _ = optimize.curve_fit(lambda cells, *law: Law(*law).kept(*cells), p0=(0.5, 1.0), **known)
    found = Law(*map(float, best))
    shown = {
        "Networks": rows["networks"],
        "k": rows["share"].map(fraction),
        "Others on a channel": ((rows["networks"] - 1) * rows["share"]).map("{:.3f}".format),
        "Kept of the ensemble (%)": rows["measured"].map("{:.1f}".format),
        "By the law (%)": found.kept(rows["networks"], rows["share"]).map("{:.1f}".format),
        "Part": np.where(rows["networks"].isin(list(fitted)), "fitted", "predicted"),
    }
    return found, pd.DataFrame(shown)


def of_each(cells: pd.Series) -> str:
    """The means of intervals by tested task: "23.9 % of MNIST, 24.5 % of SVHN and 60.0 % of CIFAR-10"."""
    *most, last = (f"{cell.mean:.1f} % of {title(name)}" for name, cell in cells.items())
    return f"{', '.join(most)} and {last}"
