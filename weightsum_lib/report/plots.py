"""The report's figures: axes with units, intervals, one message in the title, Okabe–Ito colours, an opaque ground.

Most take a summary (:func:`weightsum_lib.report.tables.summarize`) and the message, and return the figure. None is
wider than nine inches, so that a phone shows its letters.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from weightsum_lib.report.findings import CHANCE
from weightsum_lib.report.tables import Interval, fraction, span, title
from weightsum_lib.study.params import DISJOINT, RANDOM

# Okabe & Ito 2008: told apart by colour-blind readers; markers differ too, for print.
BEFORE, AFTER, CONTROL = "#0072B2", "#D55E00", "#009E73"
_COLOURS = [BEFORE, AFTER, CONTROL, "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_MARKERS = "osD^vP*X"
_LINES = cycler(color=_COLOURS * 8) + cycler(marker=[*_MARKERS] * 7)  # no two of 56 look the same
_NETWORKS = {  # how the columns of a summary are shown
    "before": {"label": "alone, before the sum", "color": BEFORE, "fmt": "o", "mfc": "none", "zorder": 3},
    "after": {"label": "the sum", "color": AFTER, "fmt": "o"},
    "other": {"label": "control: the other network alone", "color": CONTROL, "fmt": "D", "mfc": "white"},
}


def use_style() -> None:
    """Set the report's look for every figure drawn after it."""
    sns.set_theme(style="whitegrid")
    plt.rcParams |= {"figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 110}
    plt.rcParams |= {"axes.titlesize": 12, "axes.titlelocation": "left", "legend.frameon": False}
    plt.rcParams |= {"axes.prop_cycle": _LINES, "lines.markersize": 6, "errorbar.capsize": 3}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG without date or version inside: the same results give the same file."""
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})


def _panels(columns: int, size: tuple[float, float], rows: int = 1, **options) -> tuple[Figure, np.ndarray]:
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def _of_tasks(summary: pd.DataFrame, height: float, unit: str) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel a tested task, and each panel with the summary's rows of its task."""
    names = summary.index.unique("tested")
    figure, ((*panels,),) = _panels(len(names), (9, height), sharey=True)
    panels[0].set_ylabel(unit)
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(f"on {title(name)}")
    return figure, [(axes, summary.xs(name, level="tested")) for axes, name in zip(panels, names, strict=True)]


def _done(figure: Figure, message: str) -> Figure:
    """Put the figure's one message on top and one legend of all its panels below; the caller shows it."""
    width = figure.get_figwidth()
    figure.suptitle(textwrap.fill(message, int(9.5 * width)), x=0.01, ha="left", fontweight="bold", fontsize=12)
    found = {label: mark for axes in figure.axes for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if found:
        columns = max(1, int(width / (0.5 + 0.07 * max(map(len, found)))))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=10)
    plt.close(figure)
    return figure


def _spread(cells: Iterable[Interval | None]) -> tuple[np.ndarray, np.ndarray]:
    """Means (n,), and how far the interval reaches below and above them (2, n); without one 0, what is missing nan."""
    cells = [cell if isinstance(cell, Interval) else Interval(np.nan, None, None, 0) for cell in cells]
    mean, low, high = np.array([(c.mean, *(c.mean if end is None else end for end in c[1:3])) for c in cells]).T
    return mean, np.clip([mean - low, high - mean], 0, None)


def _n(summary: pd.DataFrame, bars: str = ", bars: 95 % interval") -> str:
    """How many seeds the rows have, and, where they are several, what the bars are."""
    low, high = summary["n"].min(), summary["n"].max()
    return f"n = {low if low == high else f'{low} to {high}'} seed" + (f"s{bars}" if high > 1 else "")


def before_after(summary: pd.DataFrame, message: str) -> Figure:
    """Accuracy before and after the sum, and of the other network as control: a line a row, a panel a task.

    Args:
        summary: by method and tested task, with ``before``, ``after``, ``other``, ``n``.
        message: what the figure says.
    """
    figure, panels = _of_tasks(summary, 2 + 0.42 * len(summary.index.droplevel("tested").unique()), "")
    for axes, rows in panels:
        y = range(len(rows))
        axes.hlines(y, *(_spread(rows[end])[0] for end in ("before", "after")), color="0.7", lw=2, zorder=1)
        for network, look in _NETWORKS.items():
            means, halves = _spread(rows[network])
            axes.errorbar(means, y, xerr=halves, ms=8, mew=1.8, **{"zorder": 2, **look})
        axes.axvline(CHANCE, color="0.5", ls=":", lw=1, label="chance")
        axes.set_yticks(y, rows.index)
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 103))
        axes.set_xlabel(f"test accuracy (%)\n{_n(rows)}", fontsize=10)
        axes.grid(axis="y", visible=False)
    return _done(figure, message)


def curves(histories: Mapping[str, Sequence[dict]], main: str, support: str, message: str) -> Figure:
    """Training losses and validation accuracies over the epochs, a row a method.

    Args:
        histories: method to its run's rows (:func:`weightsum_lib.train`).
        main: title of the main task.
        support: title of the support task.
        message: what the figure says.
    """
    series = {
        "main": ("C0o-", f"θ_main on {main}"),
        "sum": ("C1s-", f"the sum on {main}"),
        "third": ("C1X-", "third term"),
        "support": ("C2^-", f"θ_support on {support}"),
    }
    units = {"loss": "training loss\n(nats)", "val": "validation\naccuracy (%)"}
    figure, grid = _panels(2, (9, 1 + 1.7 * len(histories)), len(histories), sharex=True, sharey="col")
    for row, (method, epochs) in zip(grid, histories.items(), strict=True):
        history = pd.DataFrame(epochs).set_index("epoch")
        row[0].set_title(method)
        for axes, (kind, unit) in zip(row, units.items(), strict=True):
            axes.set_ylabel(unit, fontsize=10)
            for name, (look, label) in series.items():
                if f"{kind}_{name}" in history:
                    axes.plot(history[f"{kind}_{name}"], look, ms=5, label=label)
    plt.setp(grid[-1], xlabel="epoch")
    grid[0, 0].xaxis.set_major_locator(plt.MaxNLocator(integer=True))  # of all, which share it
    grid[0, 1].set_ylim(0, 101)
    return _done(figure, message)


def _by_layer(axes: Axes, rows: pd.DataFrame, column: str, unit: str, methods: Sequence[str]) -> None:
    """A line a method over the layers; one of several ``methods`` looks the same wherever some are missing."""
    shown = rows.pivot(index="layer", columns="method", values=column)
    shown = shown.reindex(index=rows["layer"].unique(), columns=list(methods))
    axes.plot(shown.index, shown, alpha=0.85, label=[*shown])
    axes.tick_params(axis="x", rotation=60)
    axes.set_ylabel(unit)
    if column == "explained":
        axes.set_ylim(0, 1.03)


def layers(rows: pd.DataFrame, explained: pd.DataFrame, message: str) -> Figure:
    """Norm ratio and cosine of two networks' weights, and what one explains of the sum, by layer, a line a method.

    Args:
        rows: ``method``, ``layer``, ``norm_ratio``, ``cosine``.
        explained: ``method``, ``layer``, ``explained``.
        message: what the figure says.
    """
    figure, ((ratio,), (cosine,), (last,)) = _panels(1, (8.5, 8.5), 3, sharex=True)
    methods = rows["method"].unique()
    _by_layer(ratio, rows, "norm_ratio", "‖W_main‖ / ‖W_support‖", methods)
    _by_layer(cosine, rows, "cosine", "cosine of the two weights", methods)
    _by_layer(last, explained, "explained", "variance in the sum\nthat θ_main explains", methods)
    ratio.axhline(1, color="0.4", lw=1, ls=":")
    cosine.axhline(0, color="0.4", lw=1, ls=":")
    ends = min(0.2, rows["norm_ratio"].min() / 1.2), max(5, rows["norm_ratio"].max() * 1.2)
    ratio.set(yscale="log", yticks=[0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50], ylim=ends)
    ratio.yaxis.set_major_formatter("{x:g}")
    ratio.minorticks_off()
    cosine.set_ylim(-1, 1.05)
    return _done(figure, message)


def plane(planes: Mapping[str, dict], names: Sequence[str], message: str) -> Figure:
    """Validation accuracy of α·θ_first + β·θ_second: a row a method, a column a task.

    Args:
        planes: method to its grid (:func:`weightsum_lib.study.measure.plane`).
        names: the two datasets, first and second.
        message: what the figure says.
    """
    figure, grid = _panels(2, (8.2, 3.3 * len(planes)), len(planes), sharex=True, sharey=True)
    for row, (method, found) in zip(grid, planes.items(), strict=True):
        c = found["coefficients"]
        for axes, name in zip(row, names, strict=True):
            image = axes.pcolormesh(c, c, np.array(found[name]), vmin=0, vmax=100, cmap="cividis", shading="nearest")
            axes.plot(1, 1, "*", ms=15, mfc="white", mec="black")
            axes.plot([1, 0], [0, 1], "o", ms=8, mfc="white", mec="black")
            axes.set(title=f"{method}: on {title(name)}", xticks=np.arange(0, 2, 0.5), yticks=np.arange(0, 2, 0.5))
            axes.grid(False)
        row[0].set_ylabel(f"α, coefficient of θ of {title(names[0])}")
    plt.setp(grid[-1], xlabel=f"β, coefficient of θ of {title(names[1])}")
    figure.colorbar(image, ax=grid, label="validation accuracy (%)", fraction=0.03, pad=0.02)
    return _done(figure, message)


def policies(shown: Mapping[str, pd.Series], names: Sequence[str], message: str) -> Figure:
    """Accuracy under every batch-norm policy: a row a method, a column a policy, a panel a tested network.

    Args:
        shown: a panel's title to intervals by method and policy.
        names: the policies, in order; one that no method has is left out, that some lack stays empty there.
        message: what the figure says.
    """
    methods = next(iter(shown.values())).index.unique("method")
    figure, ((*panels,),) = _panels(len(shown), (9, 1.6 + 0.38 * len(methods)), sharey=True)
    for axes, (heading, cells) in zip(panels, shown.items(), strict=True):
        means = cells.map(lambda cell: cell.mean).unstack("policy").reindex(methods)
        means = means[[name for name in names if name in means]]
        means.columns = [name.replace("_", "\n") for name in means]
        look = {"vmin": 0, "vmax": 100, "cmap": "cividis", "cbar": False, "yticklabels": False}
        sns.heatmap(means, ax=axes, annot=True, fmt=".0f", **look)
        axes.set(title=heading, xlabel="", ylabel="")
        axes.set_yticks(np.arange(len(methods)) + 0.5, methods)
        axes.tick_params(labelsize=9, rotation=0, grid_alpha=0)
    return _done(figure, message)


def why(explained: pd.DataFrame, summary: pd.DataFrame, message: str) -> Figure:
    """What the partner does inside the sum, and where the accuracy is lost.

    Args:
        explained: frames of :func:`weightsum_lib.study.measure.explained`, on the first tested task's images.
        summary: by method and tested task, with ``loudness``, ``interference``, ``n``.
        message: what the figure says.
    """
    figure = plt.figure(figsize=(9, 6.2 + 0.15 * len(summary)), layout="constrained")
    inside, *panels = figure.subplot_mosaic([[0, 0], [1, 2]], height_ratios=[3, 1.5 + 0.15 * len(summary)]).values()
    both = summary.index.unique("tested")
    unit = f"variance explained\nby θ of {title(both[0])} alone"
    _by_layer(inside, explained, "explained", unit, explained["method"].unique())
    inside.set_title(f"inside the sum, on {title(both[0])}, seed 0")
    kinds = {"loudness": "lost to the other's loud answers", "interference": "lost to interference of weights"}
    for axes, name in zip(panels, both, strict=True):
        lost = summary.xs(name, level="tested")
        points = lost[list(kinds)].map(lambda cell: max(cell.mean, 0)).rename(columns=kinds)
        points[::-1].plot.barh(stacked=True, ax=axes, color=["0.75", "0.35"], width=0.8, legend=False)
        axes.set(title=f"lost on {title(name)}", xlabel=f"points, {_n(lost, bars='')}", ylabel="", xlim=(0, 100))
        axes.grid(axis="y", visible=False)
    panels[1].set_yticklabels([])
    return _done(figure, message)


def kept_by_share(summary: pd.DataFrame, message: str) -> Figure:
    """What sums under random keys keep, against the share of the sum's channels that each network has.

    Args:
        summary: by line, share and tested task, with ``kept`` and ``n``.
        message: what the figure says.
    """
    figure, panels = _of_tasks(summary, 4.8, "kept: after / before (%)")
    for axes, rows in panels:
        for line, own in rows.groupby("line", sort=False):
            own = own.droplevel("line").sort_index()
            axes.errorbar(own.index, *_spread(own["kept"]), alpha=0.85, label=line)
        shares = rows.index.unique("share")
        axes.axhline(100, color="0.5", ls=":", lw=1, label="nothing is lost")
        axes.set(xscale="log", xlabel=f"share of the sum's channels that each has, k\n{_n(rows)}")
        axes.set_xticks(shares, [fraction(share) for share in shares])
        axes.minorticks_off()
    return _done(figure, message)


def lost_by_layer(summary: pd.DataFrame, message: str) -> Figure:
    """Points of accuracy below the ensemble when keys are random in one layer only.

    Args:
        summary: by layer and tested task, with ``interference`` and ``n``.
        message: what the figure says.
    """
    figure, panels = _of_tasks(summary, 3.4, "points lost to\nshared channels")
    for axes, rows in panels:
        mean, ends = _spread(rows["interference"])
        axes.bar([layer.rpartition(".")[2] for layer in rows.index], mean, yerr=ends, color=AFTER)
        axes.set_xlabel(f"layer with random keys\n{_n(rows)}")
        axes.tick_params(axis="x", rotation=60)
    return _done(figure, message)


def by_draw(rows: pd.DataFrame, message: str) -> Figure:
    """What sums under random keys keep, against the share of a network's channels that others have: a point a draw.

    Args:
        rows: wide rows with the level ``line``, and ``shared`` and ``kept``.
        message: what the figure says.
    """
    figure, panels = _of_tasks(rows, 4, "kept: after / before (%)")
    for axes, own in panels:
        for line, each in own.groupby("line", sort=False):
            axes.plot(100 * each["shared"], each["kept"], ls="", ms=5, alpha=0.6, label=line)
        axes.set_xlabel("channels that the other network has too\n(%, mean of the layers), a point a draw")
    return _done(figure, message)


def capacity(rows: pd.DataFrame, law: Callable, message: str) -> Figure:
    """What tasks keep on average when networks join the sum; and of the ensemble, against the expected collisions.

    Args:
        rows: wide rows with the levels ``method``, ``share`` and ``networks``, how many are summed.
        law: of the number of networks and the share k, what random keys keep of the ensemble (%).
        message: what the figure says.
    """
    figure, ((left, right),) = _panels(2, (9, 4.6))
    means = rows.groupby(["method", "share", "networks"], sort=False)[["kept", "kept_of_ensemble"]].mean().reset_index()
    of_k, random = means["share"].map(fraction), means["method"] == RANDOM
    means["line"] = means["method"].where(~random, RANDOM + ", k = " + of_k)
    means["others"] = (means["networks"] - 1) * means["share"]
    style = {"hue": "line", "style": "line", "markers": dict(zip(means["line"].unique(), _MARKERS, strict=False))}
    sns.lineplot(means, x="networks", y="kept", dashes=False, errorbar=None, ax=left, **style)
    sns.scatterplot(means[random], x="others", y="kept_of_ensemble", legend=False, ax=right, **style)
    of_most = means[random & (means["networks"] == means["networks"].max())]
    right.plot(of_most["others"], of_most["kept_of_ensemble"], "ko", ms=13, mfc="none", label="not in the fit")
    shares = means.loc[random, "share"]
    x = np.geomspace(shares.min(), (means["networks"].max() - 1) * shares.max())
    right.plot(x, law(1 + x, 1.0), "k-", marker="", lw=1, label="the law")
    left.get_legend().remove()
    left.set(xlabel="networks in the sum", ylabel="kept (%), mean of the tasks", xticks=means["networks"].unique())
    right.set(xscale="log", xlabel="expected others on a channel, (N − 1) · k", ylabel="kept of the ensemble (%)")
    return _done(figure, message)


def merged(summary: pd.DataFrame, published: Mapping[str, Mapping], message: str) -> Figure:
    """Every way to make one network of two on one axis, a panel a task; a line a way, a marker a pair.

    Args:
        summary: by task, way and networks, with ``after`` (percent of all classes) and ``n``.
        published: what others report, name to accuracy by way, shown where the task is CIFAR-10.
        message: what the figure says.
    """
    ways, pairs = (list(summary.index.unique(level)) for level in ("way", "networks"))
    figure, ((*panels,),) = _panels(len(tasks := summary.index.unique("task")), (5 + 2 * len(tasks), 9), sharey=True)
    for axes, task in zip(panels, tasks, strict=True):
        rows = summary.xs(task, level="task")
        for pair, own in rows.groupby("networks", sort=False):
            mean, ends = _spread(own["after"])
            number, color = pairs.index(pair), AFTER if pair.startswith((RANDOM, DISJOINT)) else BEFORE
            own_ways = [ways.index(way) + 0.7 * number / len(pairs) - 0.3 for way in own.index.get_level_values("way")]
            look = {"fmt": _MARKERS[number % 8], "color": color, "mfc": "none" if number % 2 else color}
            axes.errorbar(mean, own_ways, xerr=ends, ms=7, alpha=0.8, label=pair, **look)
        for name, values in published.items() if task.startswith("cifar10") else ():
            axes.plot(list(values.values()), [ways.index(w) for w in values], "D", color="0.5", mfc="none", label=name)
        best = max(c.mean for (way, who), c in rows["after"].items() if way[:8] == "ensemble" and ", seen" not in who)
        axes.axvline(best, color="k", ls="--", lw=1, label="the best ensemble (unseen)")
        axes.set(xlim=(0, 101), title=title(task), xlabel=f"all ten classes: test accuracy (%)\n{_n(rows)}")
        axes.set_yticks(range(len(ways)), ways)
        axes.set_ylim(len(ways) - 0.5, -0.5)
    return _done(figure, message)


def examples(datasets: Sequence, message: str, channels: int = 3) -> Figure:
    """The first test image of each class, a row a dataset.

    Args:
        datasets: :class:`weightsum_lib.Dataset` objects.
        message: what the figure says.
        channels: of the networks' input; 1: grey.
    """
    figure, grid = _panels(10, (8, 0.85 * len(datasets) + 0.4), len(datasets))
    for row, dataset in zip(grid, datasets, strict=True):
        for label, axes in enumerate(row):
            index = int((dataset.test_labels == label).int().argmax())
            image = dataset.test_images[index].permute(1, 2, 0).cpu().numpy()
            image = Image.fromarray(image).convert("RGB" if channels == 3 else "L")  # L: as the networks weigh colours
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
        kind = "" if dataset.source == "real" else "\n(stand-in)"
        row[0].set_ylabel(f"{title(dataset.name)}{kind}", fontsize=9, rotation=0, ha="right", va="center")
    return _done(figure, message)


def speed(steps: pd.DataFrame, device: str) -> Figure:
    """How long each way of making a step takes, as a multiple of the floor.

    Args:
        steps: ``setting``, ``way``, ``label`` and ``ratio_to_floor``, a mean of turns and their quartiles.
        device: what it was measured on.
    """
    settings = steps.groupby("setting", sort=False)
    figure, ((*panels,),) = _panels(len(settings), (3.4 + 2.6 * len(settings), 3.6), sharey=True)
    for axes, (setting, shown) in zip(panels, settings, strict=True):
        ratios, around = _spread(shown["ratio_to_floor"])
        colours = np.where(shown["way"].str.startswith("ours"), AFTER, BEFORE)
        bars = axes.barh(shown["label"], ratios, xerr=around, color=colours, alpha=0.85, height=0.6)
        axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
        axes.axvline(1, color="0.3", ls=":", lw=1)
        axes.set(xlabel="time of a step / floor", title=setting.partition(", ")[2])
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    ours = [cell.mean for cell in steps["ratio_to_floor"][steps["way"] == "ours"]]
    return _done(figure, f"The three-term step takes {span(ours)} times as long as its floor ({device})")
