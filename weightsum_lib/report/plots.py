"""The report's figures: axes with units, intervals, one message in the title, Okabe–Ito colours, an opaque ground.

Most take a summary (:func:`weightsum_lib.report.tables.summarize`) and the message, and return the figure.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weightsum_lib.report.findings import CHANCE
from weightsum_lib.report.tables import Interval, fraction, title
from weightsum_lib.study.params import RANDOM

# Okabe & Ito 2008: told apart by colour-blind readers; markers differ too, for print.
BEFORE, AFTER, CONTROL = "#0072B2", "#D55E00", "#009E73"
_OTHERS = ["#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_MARKERS = "osD^vP*X"  # eight, and seven colours: no two of 56 lines look the same
BARS = ", bars: 95 % interval"
_NETWORKS = {  # how the columns of a summary are shown
    "before": {"label": "alone, before the sum", "color": BEFORE, "fmt": "o", "mfc": "white"},
    "after": {"label": "the sum", "color": AFTER, "fmt": "o"},
    "other": {"label": "control: the other network alone", "color": CONTROL, "fmt": "D", "mfc": "white"},
}


def use_style() -> None:
    """Set the report's look for every figure drawn after it."""
    sns.set_theme(style="whitegrid", palette=[BEFORE, AFTER, CONTROL, *_OTHERS])
    plt.rcParams |= {"figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 110}
    plt.rcParams |= {"axes.titlesize": 12, "axes.titlelocation": "left", "legend.frameon": False}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG without date or version inside: the same results give the same file."""
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})


def _panels(columns: int, size: tuple[float, float], rows: int = 1, **options) -> tuple[Figure, np.ndarray]:
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def _of_tasks(summary: pd.DataFrame, size: tuple[float, float]) -> tuple[Figure, list[tuple[Axes, str, pd.DataFrame]]]:
    """A figure with a panel a tested task: the panel, the task, and the summary's rows of it."""
    names = summary.index.unique("tested")
    figure, ((*panels,),) = _panels(len(names), size, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(f"on {title(name)}")
    return figure, [(axes, n, summary.xs(n, level="tested")) for axes, n in zip(panels, names, strict=True)]


def _done(figure: Figure, message: str) -> Figure:
    """Put the figure's one message on top and one legend of all its panels below; the caller shows it."""
    width, found = figure.get_figwidth(), {}
    figure.suptitle(textwrap.fill(message, int(9.5 * width)), x=0.01, ha="left", fontweight="bold", fontsize=12)
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        columns = max(1, int(width / (0.5 + 0.07 * max(map(len, found)))))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=10)
    plt.close(figure)
    return figure


def _spread(cells: Iterable[Interval]) -> tuple[np.ndarray, np.ndarray]:
    """Means (n,), and how far the interval reaches below and above them (2, n); without one 0."""
    cells = [cell if cell.low is not None else cell._replace(low=cell.mean, high=cell.mean) for cell in cells]
    mean, low, high = np.array([cell[:3] for cell in cells]).T
    return mean, np.clip([mean - low, high - mean], 0, None)


def _n(summary: pd.DataFrame, bars: str = "") -> str:
    """How many seeds the rows have, and, where they are several, what the bars are."""
    low, high = summary["n"].min(), summary["n"].max()
    return f"n = {low if low == high else f'{low} to {high}'} seed" + (f"s{bars}" if high > 1 else "")


def _dumbbells(axes: Axes, summary: pd.DataFrame, networks: Sequence[str], task: str = "") -> None:
    """A line a row of the summary, a marker a network."""
    y = range(len(summary))
    axes.hlines(y, *(_spread(summary[end])[0] for end in ("before", "after")), color="0.7", lw=2, zorder=1)
    for network in networks:
        means, halves = _spread(summary[network])
        axes.errorbar(means, y, xerr=halves, ms=8, capsize=3, mew=1.8, zorder=2, **_NETWORKS[network])
    axes.axvline(CHANCE, color="0.5", ls=":", lw=1, label="chance")
    axes.set_yticks(y, [label if isinstance(label, str) else label[0] for label in summary.index])
    axes.set(ylim=(len(summary) - 0.5, -0.5), xlim=(0, 101))
    axes.set_xlabel(f"{task} test accuracy (%)".strip() + f"\n{_n(summary, BARS)}", fontsize=10)
    axes.grid(axis="y", visible=False)


def before_after(summary: pd.DataFrame, message: str, task: str = "") -> Figure:
    """Accuracy on a task before and after the sum, a line a row.

    Args:
        summary: rows with ``before``, ``after``, ``n``; the index labels them.
        message: what the figure says.
        task: title of the tested task, for the axis; empty where the labels name it.
    """
    figure, ((axes,),) = _panels(1, (8.5, 1.8 + 0.4 * len(summary)))
    _dumbbells(axes, summary, ("before", "after"), task)
    return _done(figure, message)


def unmet(summary: pd.DataFrame, message: str) -> Figure:
    """Task 3: each task's own network, the sum, and the other task's network as control, side by side.

    Args:
        summary: by method and tested task, with ``before``, ``after``, ``other``, ``n``.
        message: what the figure says.
    """
    figure, panels = _of_tasks(summary, (10, 2 + 0.21 * len(summary)))
    for axes, _, rows in panels:
        _dumbbells(axes, rows, ("before", "after", "other"))
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
        "main": (f"θ_main on {main}", BEFORE, "o"),
        "sum": (f"the sum on {main}", AFTER, "s"),
        "third": ("third term", AFTER, "X"),
        "support": (f"θ_support on {support}", CONTROL, "^"),
    }
    units = {"loss": "training loss\n(nats)", "val": "validation\naccuracy (%)"}
    figure, grid = _panels(2, (9, 1 + 1.7 * len(histories)), len(histories), sharex=True, sharey="col")
    for row, (method, epochs) in zip(grid, histories.items(), strict=True):
        history = pd.DataFrame(epochs).set_index("epoch")
        for axes, (kind, unit) in zip(row, units.items(), strict=True):
            for name in (name for name in series if f"{kind}_{name}" in history):
                label, colour, marker = series[name]
                axes.plot(history[f"{kind}_{name}"], marker=marker, ms=5, color=colour, label=label)
            axes.set_ylabel(unit, fontsize=10)
        row[0].set_title(method)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    grid[0, 1].set_ylim(0, 101)
    return _done(figure, message)


def _by_layer(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """A line a method over the layers."""
    for i, (method, own) in enumerate(rows.groupby("method", sort=False)):
        axes.plot(own["layer"], own[column], marker=_MARKERS[i % len(_MARKERS)], ms=6, alpha=0.85, label=method)
    axes.tick_params(axis="x", rotation=60)


def layers(rows: pd.DataFrame, explained: pd.DataFrame, message: str) -> Figure:
    """Norm ratio and cosine of two networks' weights, and what one explains of the sum, by layer, a line a method.

    Args:
        rows: ``method``, ``layer``, ``norm_ratio``, ``cosine``.
        explained: ``method``, ``layer``, ``explained``.
        message: what the figure says.
    """
    figure, ((left, right, last),) = _panels(3, (13, 4.8))
    _by_layer(last, explained, "explained")
    last.set(ylim=(0, 1.03), ylabel="variance in the sum that θ_main explains")
    for axes, column, even in ((left, "norm_ratio", 1), (right, "cosine", 0)):
        _by_layer(axes, rows, column)
        axes.axhline(even, color="0.4", lw=1, ls=":")
    left.set(yscale="log", ylabel="‖W_main‖ / ‖W_support‖")
    left.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50])
    left.yaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    left.set_ylim(min(0.2, rows["norm_ratio"].min() / 1.2), max(5, rows["norm_ratio"].max() * 1.2))
    right.set(ylabel="cosine of the two weights", ylim=(-1, 1.05))
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
            axes.set_title(f"{method}: on {title(name)}")
            axes.grid(False)
        row[0].set_ylabel(f"α, coefficient of θ of {title(names[0])}")
    for axes in grid[-1]:
        axes.set_xlabel(f"β, coefficient of θ of {title(names[1])}")
    figure.colorbar(image, ax=grid, label="validation accuracy (%)", fraction=0.03, pad=0.02)
    return _done(figure, message)


def policies(shown: Mapping[str, pd.Series], names: Sequence[str], message: str) -> Figure:
    """Accuracy under every batch-norm policy: a row a method, a column a policy, a panel a tested network.

    Args:
        shown: a panel's title to intervals by method and policy.
        names: the policies, in order; one that a method has not stays empty.
        message: what the figure says.
    """
    methods = next(iter(shown.values())).index.unique("method")
    width = 0.08 * max(map(len, methods)) + 3.5 * len(shown)
    figure, ((*panels,),) = _panels(len(shown), (width, 1.6 + 0.38 * len(methods)), sharey=True)
    for axes, (heading, cells) in zip(panels, shown.items(), strict=True):
        values = pd.Series(_spread(cells)[0], cells.index).unstack("policy").reindex(index=methods, columns=list(names))
        axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (y, x), value in np.ndenumerate(values.fillna(-1)):
            if value >= 0:
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", size=9, color="k" if value > 50 else "w")
        axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], size=9)
        axes.set_yticks(range(len(methods)), methods, size=9)
        axes.set_title(heading)
        axes.grid(False)
    return _done(figure, message)


def why(explained: pd.DataFrame, summary: pd.DataFrame, message: str) -> Figure:
    """What the partner does inside the sum, and where the accuracy is lost.

    Args:
        explained: frames of :func:`weightsum_lib.study.measure.explained`, on the first tested task's images.
        summary: by method and tested task, with ``loudness``, ``interference``, ``n``.
        message: what the figure says.
    """
    both = summary.index.unique("tested")
    figure, ((left, *panels),) = _panels(3, (13, 3.6 + 0.15 * len(summary)), width_ratios=[1.3, 1, 1])
    _by_layer(left, explained, "explained")
    left.set(ylim=(0, 1.03), ylabel=f"variance explained\nby θ of {title(both[0])} alone")
    left.set_title(f"inside the sum, on {title(both[0])}, seed 0")
    kinds = {"loudness": "lost to the other's loud answers", "interference": "lost to interference of weights"}
    for axes, name in zip(panels, both, strict=True):
        lost = summary.xs(name, level="tested")
        points = lost[list(kinds)].map(lambda cell: max(cell.mean, 0)).rename(columns=kinds)
        points.set_axis(lost.index.get_level_values("method")).plot.barh(
            stacked=True, ax=axes, color=[CONTROL, AFTER], width=0.8, legend=False
        )
        axes.set(title=f"lost on {title(name)}", xlabel=f"points, {_n(lost)}", ylabel="", xlim=(0, 100))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    panels[1].set_yticklabels([])
    return _done(figure, message)


def kept_by_share(summary: pd.DataFrame, message: str) -> Figure:
    """What sums under random keys keep, against the share of the sum's channels that each network has.

    Args:
        summary: by line, share and tested task, with ``kept`` and ``n``.
        message: what the figure says.
    """
    figure, panels = _of_tasks(summary, (11, 4.8))
    for axes, _, rows in panels:
        for i, (line, own) in enumerate(rows.groupby("line", sort=False)):
            own = own.droplevel("line").sort_index()
            mean, ends = _spread(own["kept"])
            axes.errorbar(own.index, mean, ends, fmt=f"{_MARKERS[i % 8]}-", ms=6, capsize=3, alpha=0.85, label=line)
        shares = rows.index.unique("share")
        axes.axhline(100, color="0.5", ls=":", lw=1, label="nothing is lost")
        axes.set(xscale="log", xlabel=f"share of the sum's channels that each network has, k\n{_n(rows, BARS)}")
        axes.set_xticks(shares, [fraction(share) for share in shares])
        axes.minorticks_off()
    panels[0][0].set_ylabel("kept: after / before (%)")
    return _done(figure, message)


def lost_by_layer(summary: pd.DataFrame, message: str) -> Figure:
    """Points of accuracy below the ensemble when keys are random in one layer only.

    Args:
        summary: by layer and tested task, with ``interference`` and ``n``.
        message: what the figure says.
    """
    figure, panels = _of_tasks(summary, (10, 3.2))
    for axes, _, rows in panels:
        mean, ends = _spread(rows["interference"])
        axes.bar([layer.rpartition(".")[2] for layer in rows.index], mean, yerr=ends, capsize=3, color=AFTER)
        axes.set_xlabel(f"layer with random keys, {_n(rows, BARS)}")
    panels[0][0].set_ylabel("points lost to\nshared channels")
    return _done(figure, message)


def by_draw(rows: pd.DataFrame, message: str) -> Figure:
    """What sums under random keys keep, against the share of a network's channels that others have: a point a draw.

    Args:
        rows: wide rows with the level ``line``, and ``shared`` and ``kept``.
        message: what the figure says.
    """
    figure, panels = _of_tasks(rows, (10, 3.8))
    for axes, _, own in panels:
        for i, (line, each) in enumerate(own.groupby("line", sort=False)):
            axes.plot(100 * each["shared"], each["kept"], _MARKERS[i], ms=5, alpha=0.6, label=line)
        axes.set_xlabel("channels that the other network has too\n(%, mean of the layers), a point a draw")
    panels[0][0].set_ylabel("kept: after / before (%)")
    return _done(figure, message)


def capacity(rows: pd.DataFrame, law: Callable, message: str) -> Figure:
    """What tasks keep on average when networks join the sum; and of the ensemble, against the expected collisions.

    Args:
        rows: wide rows with the levels ``method``, ``share`` and ``networks``, how many are summed.
        law: of the number of networks and the share k, what random keys keep of the ensemble (%).
        message: what the figure says.
    """
    figure, ((left, right),) = _panels(2, (11, 4.6))
    means = rows.groupby(["method", "share", "networks"], sort=False)[["kept", "kept_of_ensemble"]].mean()
    means = means.reset_index()
    of_k, random = means["share"].map(fraction), means["method"] == RANDOM
    means["line"] = means["method"].where(~random, RANDOM + ", k = " + of_k)
    means["others"] = (means["networks"] - 1) * means["share"]
    style = {"hue": "line", "style": "line", "markers": dict(zip(means["line"].unique(), _MARKERS, strict=False))}
    sns.lineplot(means, x="networks", y="kept", dashes=False, errorbar=None, ax=left, **style)
    sns.scatterplot(means[random], x="others", y="kept_of_ensemble", legend=False, ax=right, **style)
    shares = means.loc[random, "share"]
    x = np.geomspace(shares.min(), (means["networks"].max() - 1) * shares.max())
    right.plot(x, law(1 + x, 1.0), "k-", lw=1, label="the law")
    left.get_legend().remove()
    left.set(
        xlabel="networks in the sum", ylabel="kept (%), mean of the tasks", xticks=sorted(means["networks"].unique())
    )
    right.set(xscale="log", xlabel="expected others on a channel, (N − 1) · k", ylabel="kept of the ensemble (%)")
    return _done(figure, message)


def merged(summary: pd.DataFrame, ours: tuple[str, ...], published: Mapping[str, Mapping], message: str) -> Figure:
    """Every way to make one network of two on one axis, a panel a task; a line a way, a marker a pair.

    Args:
        summary: by task, way and networks, with ``after`` (percent of all classes) and ``n``.
        ours: how the names of this study's networks begin.
        published: what others report, name to accuracy by way, shown where the task is CIFAR-10.
        message: what the figure says.
    """
    ways, pairs = (list(summary.index.unique(level)) for level in ("way", "networks"))
    figure, ((*panels,),) = _panels(len(tasks := summary.index.unique("task")), (5 + 3 * len(tasks), 7), sharey=True)
    for axes, task in zip(panels, tasks, strict=True):
        rows = summary.xs(task, level="task")
        for i, (pair, own) in enumerate(rows.groupby("networks", sort=False)):
            mean, ends = _spread(own["after"])
            own_ways = [ways.index(way) for way in own.index.get_level_values("way")]
            look = {"fmt": _MARKERS[pairs.index(pair) % 8], "color": AFTER if pair.startswith(ours) else BEFORE}
            axes.errorbar(mean, own_ways, xerr=ends, ms=7, alpha=0.8, mfc="none" if i % 2 else None, label=pair, **look)
        for name, values in published.items() if task.startswith("cifar10") else ():
            axes.plot(list(values.values()), [ways.index(w) for w in values], "D", color="0.5", mfc="none", label=name)
        best = max(cell.mean for (way, _), cell in rows["after"].items() if way.startswith("ensemble"))
        axes.axvline(best, color="k", ls="--", lw=1, label="the best ensemble")
        axes.set(xlim=(0, 101), title=title(task), xlabel=f"all ten classes: test accuracy (%)\n{_n(rows, BARS)}")
        axes.set_yticks(range(len(ways)), ways)
        axes.set_ylim(len(ways) - 0.5, -0.5)
    return _done(figure, message)


def examples(datasets: Sequence, message: str, each: int = 10) -> Figure:
    """The first test image of each class, a row a dataset.

    Args:
        datasets: :class:`weightsum_lib.Dataset` objects.
        message: what the figure says.
        each: classes shown.
    """
    figure, grid = _panels(each, (each * 0.8, 0.85 * len(datasets) + 0.4), len(datasets))
    for row, dataset in zip(grid, datasets, strict=True):
        for label, axes in enumerate(row):
            index = int((dataset.test_labels == label).int().argmax())
            axes.imshow(dataset.test_images[index].permute(1, 2, 0).cpu().numpy())
            axes.set(xticks=[], yticks=[])
        kind = "" if dataset.source == "real" else "\n(stand-in)"
        row[0].set_ylabel(f"{title(dataset.name)}{kind}", fontsize=9, rotation=0, ha="right", va="center")
    return _done(figure, message)


def speed(steps: pd.DataFrame, device: str) -> Figure:
    """How long each way of making a step takes, as a multiple of the floor.

    Args:
        steps: ``setting``, ``way``, ``label``, ``ratio_to_floor`` and its ``ratio_quartiles``.
        device: what it was measured on.
    """
    settings = steps.groupby("setting", sort=False)
    figure, ((*panels,),) = _panels(len(settings), (3.4 + 2.6 * len(settings), 3.6), sharey=True)
    for axes, (setting, shown) in zip(panels, settings, strict=True):
        ratios, (low, high) = shown["ratio_to_floor"], np.array(shown["ratio_quartiles"].tolist()).T
        colours = np.where(shown["way"].str.startswith("ours"), AFTER, BEFORE)
        around = (ratios - low).clip(0), (high - ratios).clip(0)
        bars = axes.barh(
            shown["label"].str.replace("`", ""), ratios, xerr=around, color=colours, alpha=0.85, height=0.6
        )
        axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
        axes.axvline(1, color="0.3", ls=":", lw=1)
        axes.set(xlabel="time of a step / floor", title=setting.partition(", ")[2])
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    ours = steps["ratio_to_floor"][steps["way"] == "ours"]
    between = f"{ours.min():.2f}" + (f" to {ours.max():.2f}" if len(ours) > 1 else "")
    return _done(figure, f"The three-term step takes {between} times as long as its floor ({device})")
