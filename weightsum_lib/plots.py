"""The report's figures: axes with units, intervals, one message in the title, Okabe–Ito colours, an opaque ground."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from weightsum_lib.params import DATASETS
from weightsum_lib.results import CHANCE

# Okabe & Ito 2008: told apart by colour-blind readers; markers differ too, for print.
BEFORE, AFTER, CONTROL, FOURTH = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_MARKERS = "osD^vP*X"


def use_style() -> None:
    """Set the report's look for every figure drawn after it."""
    sns.set_theme(style="whitegrid", context="notebook", palette=[BEFORE, AFTER, CONTROL, FOURTH, "#E69F00", "#56B4E9"])
    plt.rcParams |= {
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "figure.dpi": 110,
        "axes.titleweight": "bold",
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "legend.frameon": False,
    }


def _message(figure: Figure, text: str) -> Figure:
    """Put the figure's one message on top, and leave it to the caller to show."""
    figure.suptitle(text, x=0.01, ha="left", fontweight="bold", fontsize=12, wrap=True)
    figure.tight_layout()
    plt.close(figure)
    return figure


def _dumbbells(axes, rows: Sequence[dict], columns: Mapping[str, tuple], labels: Sequence[str]) -> None:
    """A line a row, a marker a column; ``columns`` maps a key to (legend, colour, marker, filled)."""
    for y, row in enumerate(rows):
        points = [row[c]["mean"] for c in list(columns)[:2] if row.get(c)]
        if len(points) == 2:
            axes.plot(points, [y, y], color="0.7", lw=2, zorder=1)
        for column, (_, colour, marker, filled) in columns.items():
            if row.get(column):
                of = row[column]
                axes.errorbar(
                    of["mean"], y, xerr=of["half"], fmt=marker, ms=8, capsize=3, color=colour, zorder=2,
                    mfc=colour if filled else "white", mew=1.8,
                )  # fmt: skip
    for legend, colour, marker, filled in columns.values():
        axes.plot([], [], marker, color=colour, mfc=colour if filled else "white", mew=1.8, ms=8, label=legend)
    axes.axvline(CHANCE, color="0.5", ls=":", lw=1)
    axes.annotate(
        "chance", (CHANCE, len(rows) - 0.55), fontsize=8, color="0.4", xytext=(2, 0), textcoords="offset points"
    )
    axes.set_yticks(range(len(rows)), labels)
    axes.set(ylim=(len(rows) - 0.5, -0.6), xlim=(0, 101), xlabel="test accuracy (%)")
    axes.grid(axis="y", visible=False)


def _n(rows: Sequence[dict]) -> str:
    counts = sorted({row["n"] for row in rows})
    interval = ", bars: 95 % interval" if counts[-1] > 1 else ""
    return f"n = {' to '.join(str(c) for c in counts)} seed{'s' if counts[-1] > 1 else ''}{interval}"


def before_after(rows: Sequence[dict], message: str, task: str) -> Figure:
    """Accuracy on a task before and after the sum, a line a row.

    Args:
        rows: summarized rows with ``method``, ``before``, ``after``, ``n`` (:func:`results.summarize`).
        message: what the figure says.
        task: name of the tested task, for the axis; empty where the rows name it.
    """
    figure, axes = plt.subplots(figsize=(8.5, 1.6 + 0.42 * len(rows)))
    columns = {"before": ("before the sum", BEFORE, "o", False), "after": ("after the sum", AFTER, "o", True)}
    _dumbbells(axes, rows, columns, [r["method"] for r in rows])
    axes.set_xlabel(f"{task} test accuracy (%), {_n(rows)}".strip())
    figure.legend(loc="upper right", bbox_to_anchor=(1, 0), ncol=2)
    return _message(figure, message)


def unmet(rows: Sequence[dict], first: str, second: str, titles: Mapping[str, str], message: str) -> Figure:
    """Task 3: each task's own network, the sum, and the other task's network as control, side by side.

    Args:
        rows: summarized rows with ``method``, ``n`` and ``before_``, ``after_``, ``other_`` + dataset.
        first: left dataset.
        second: right dataset.
        titles: dataset name to its title.
        message: what the figure says.
    """
    figure, both = plt.subplots(1, 2, figsize=(10, 1.8 + 0.5 * len(rows)), sharey=True)
    for axes, name, other in zip(both, (first, second), (second, first), strict=True):
        columns = {
            f"before_{name}": ("own network, alone", BEFORE, "o", False),
            f"after_{name}": ("the sum", AFTER, "o", True),
            f"other_{name}": ("control: the other network, alone", CONTROL, "D", False),
        }
        _dumbbells(axes, rows, columns, [r["method"] for r in rows])
        axes.set(title=f"on {titles[name]} (other: θ of {titles[other]})")
        axes.title.set_fontweight("normal")
    figure.legend(*both[0].get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(1, 0), ncol=3)
    figure.text(0.01, 0, _n(rows), fontsize=10, va="top")
    return _message(figure, message)


def curves(histories: Mapping[str, Sequence[dict]], message: str, main: str, support: str) -> Figure:
    """Training losses and validation accuracies over the epochs, a column a method.

    Args:
        histories: method to its run's rows (:func:`weightsum_lib.train.train`).
        message: what the figure says.
        main: title of the main task.
        support: title of the support task.
    """
    figure, grid = plt.subplots(
        2, len(histories), figsize=(3.3 * len(histories), 5.2), sharex="col", sharey="row", squeeze=False
    )
    series = {
        "main": (f"θ_main on {main}", BEFORE, "o"),
        "sum": (f"sum on {main}", AFTER, "s"),
        "third": ("third term", AFTER, "s"),
        "support": (f"θ_support on {support}", CONTROL, "^"),
    }
    for column, (method, history) in zip(grid.T, histories.items(), strict=True):
        epochs = [row["epoch"] for row in history]
        for axes, kind in zip(column, ("loss", "val"), strict=True):
            for name, (label, colour, marker) in series.items():
                values = [row.get(f"{kind}_{name}") for row in history]
                if None not in values:
                    axes.plot(epochs, values, marker=marker, ms=4, color=colour, label=label)
        column[0].set_title(method, fontweight="normal")
        column[1].set_xlabel("epoch")
        column[1].xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    highest = max(axes.get_ylim()[1] for axes in grid[0])
    grid[0, 0].set(ylabel="training loss (nats)", ylim=(min(0, *(axes.get_ylim()[0] for axes in grid[0])), highest))
    grid[1, 0].set(ylabel="validation accuracy (%)", ylim=(0, 101))
    found = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="upper left", bbox_to_anchor=(0.05, 0), ncol=4)
    return _message(figure, message)


def layers(rows: Sequence[dict], message: str) -> Figure:
    """Norm ratio and cosine of two networks' weights, layer by layer, a line a method.

    Args:
        rows: rows with ``method``, ``layer``, ``norm_ratio``, ``cosine``.
        message: what the figure says.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for i, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
        own = [r for r in rows if r["method"] == method]
        names = [r["layer"] for r in own]
        style = {"marker": _MARKERS[i % len(_MARKERS)], "ms": 5, "alpha": 0.85, "label": method}
        left.plot(names, [r["norm_ratio"] for r in own], **style)
        right.plot(names, [r["cosine"] for r in own], **style)
    left.axhline(1, color="0.4", lw=1, ls=":")
    right.axhline(0, color="0.4", lw=1, ls=":")
    ratios = [r["norm_ratio"] for r in rows]
    left.set(yscale="log", ylabel="‖W_main‖ / ‖W_support‖")
    left.set_ylim(min(0.2, min(ratios) / 1.2), max(5, max(ratios) * 1.2))
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    right.set(ylabel="cosine of the two weights", ylim=(-1, 1))
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=60)
    right.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return _message(figure, message)


def plane(planes: Mapping[str, dict], titles: Mapping[str, str], message: str) -> Figure:
    """Validation accuracy of α·θ_first + β·θ_second: a row a method, a column a task.

    Args:
        planes: method to :func:`weightsum_lib.evaluate.coefficient_plane`.
        titles: the two dataset names, first then second, to their titles.
        message: what the figure says.
    """
    figure, grid = plt.subplots(
        len(planes), 2, figsize=(8.2, 3.3 * len(planes)), squeeze=False, sharex=True, sharey=True, layout=None
    )
    first, second = titles.values()
    for row, (method, found) in zip(grid, planes.items(), strict=True):
        c = found["coefficients"]
        for axes, (name, title) in zip(row, titles.items(), strict=True):
            image = axes.pcolormesh(c, c, np.array(found[name]), vmin=0, vmax=100, cmap="cividis", shading="nearest")
            axes.plot(1, 1, "*", ms=15, mfc="white", mec="black")
            axes.plot([1, 0], [0, 1], "o", ms=8, mfc="white", mec="black")
            axes.set_title(f"{method}: on {title}", fontweight="normal")
            axes.grid(False)
        row[0].set_ylabel(f"α, coefficient of θ of {first}")
        figure.colorbar(image, ax=row, label="validation accuracy (%)", fraction=0.03, pad=0.02)
    for axes in grid[-1]:
        axes.set_xlabel(f"β, coefficient of θ of {second}")
    figure.suptitle(message, x=0.01, ha="left", fontweight="bold", fontsize=12)
    plt.close(figure)
    return figure


def policies(rows: Sequence[dict], columns: Mapping[str, str], names: Sequence[str], message: str) -> Figure:
    """Accuracy of every sum under every batch-norm policy: a row a method, a column a policy, a panel a task.

    Args:
        rows: summarized rows with ``method``, ``policy`` and the columns.
        columns: key of the rows to the panel's title.
        names: the policies, in order; one that a method has not stays empty.
        message: what the figure says.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = plt.subplots(
        1, len(columns), figsize=(3.2 + 3.4 * len(columns), 1.6 + 0.38 * len(methods)), sharey=True, squeeze=False
    )
    for axes, (column, title) in zip(panels[0], columns.items(), strict=True):
        found = {(row["method"], row["policy"]): row[column]["mean"] for row in rows}
        values = np.array([[found.get((m, name), np.nan) for name in names] for m in methods])
        sns.heatmap(
            values, vmin=0, vmax=100, cmap="cividis", annot=True, fmt=".0f", annot_kws={"size": 9}, cbar=False,
            xticklabels=[name.replace("_", "\n") for name in names], yticklabels=methods, ax=axes,
        )  # fmt: skip
        axes.set_title(title, fontweight="normal")
        axes.tick_params(axis="both", rotation=0, labelsize=9)
        axes.grid(False)
    return _message(figure, message)


def why(explained: Sequence[dict], lost: Sequence[dict], titles: Mapping[str, str], message: str) -> Figure:
    """What the partner does inside the sum, and where the accuracy is lost.

    Args:
        explained: rows of :func:`weightsum_lib.evaluate.explained_variance`.
        lost: summarized rows with ``method`` and, for each dataset, ``loudness_`` and ``interference_`` + its name.
        titles: the two dataset names to their titles; ``explained`` is measured on the first one's images.
        message: what the figure says.
    """
    methods = list(dict.fromkeys(row["method"] for row in lost))
    figure, panels = plt.subplots(
        1, 3, figsize=(13, 2.6 + 0.36 * len(methods)), width_ratios=[1.35, 1, 1], layout="constrained"
    )
    for i, method in enumerate(dict.fromkeys(row["method"] for row in explained)):
        own = [row for row in explained if row["method"] == method]
        values = [row["explained"] for row in own]
        panels[0].plot([r["layer"] for r in own], values, marker=_MARKERS[i % len(_MARKERS)], ms=6, label=method)
    first = next(iter(titles.values()))
    panels[0].tick_params(axis="x", rotation=60)
    panels[0].set(ylim=(0, 1.03), ylabel="variance explained by θ of " + first + " alone")
    panels[0].set_title(f"inside the sum, on {first}, seed 0", fontweight="normal")
    panels[0].legend(fontsize=9, loc="lower left", framealpha=0.9, frameon=True)
    for axes, (name, title) in zip(panels[1:], titles.items(), strict=True):
        left = np.zeros(len(methods))
        for kind, label, colour in (
            ("loudness", "to the other's loud answers", CONTROL),
            ("interference", "to interference of weights", AFTER),
        ):
            values = np.array([row[f"{kind}_{name}"]["mean"] for row in lost])
            axes.barh(methods, np.maximum(values, 0), left=left, color=colour, label=label)
            left += np.maximum(values, 0)
        axes.set_title(f"lost on {title}", fontweight="normal")
        axes.set(xlabel=f"points of test accuracy, {_n(lost).split(',')[0]}", xlim=(0, 100))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    panels[2].set_yticks([])
    panels[1].legend(fontsize=9, loc="lower right")
    figure.suptitle(message, x=0.01, ha="left", fontweight="bold", fontsize=12)
    plt.close(figure)
    return figure


def against_overlap(
    rows: Sequence[dict], titles: Mapping[str, str], controls: Mapping[str, float], message: str
) -> Figure:
    """Task 3 against the share of channels that the two networks have in common, a panel a task.

    Args:
        rows: summarized rows with ``method``, ``overlap`` (0 to 1), ``n``, and ``before_``, ``after_`` + dataset.
        titles: the two dataset names to their titles.
        controls: dataset name to the accuracy of the other task's network there, a line.
        message: what the figure says.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, sharex=True)
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        rest = [row for row in rows if not row.get("line")]
        line = sorted((row for row in rows if row.get("line")), key=lambda row: row["overlap"])
        x, after = [r["overlap"] for r in line], [r[f"after_{name}"] for r in line]
        axes.plot(x, [r[f"before_{name}"]["mean"] for r in line], "o--", mfc="white", color=BEFORE, label="before")
        halves = [v["half"] or 0 for v in after]
        axes.errorbar(
            x, [v["mean"] for v in after], yerr=halves, fmt="o-", capsize=3, color=AFTER, label="the sum, random keys"
        )
        for i, row in enumerate(rest):
            value = row[f"after_{name}"]
            axes.errorbar(
                row["overlap"], value["mean"], yerr=value["half"], fmt=_MARKERS[1 + i % 7], ms=7, capsize=3,
                color=f"C{2 + i % 4}", label=row["method"],
            )  # fmt: skip
        axes.axhline(controls[name], color=CONTROL, ls="-.", lw=1, label="control: the other network alone")
        axes.axhline(CHANCE, color="0.5", ls=":", lw=1, label="chance")
        axes.set(xlabel="share of channels in common, k", ylim=(0, 101), title=f"on {title}", xlim=(-0.04, 1.04))
        axes.title.set_fontweight("normal")
    panels[0].set_ylabel(f"test accuracy (%), {_n(rows).split(',')[0]}")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncol=4, fontsize=9
    )
    return _message(figure, message)


def draws(rows: Sequence[dict], summary: Sequence[dict], titles: Mapping[str, str], message: str) -> Figure:
    """What a sum of the same two networks keeps under one draw of the keys after another, a panel a task.

    Args:
        rows: dicts with ``method``, ``seed``, and ``draws_`` + dataset, a list of percents.
        summary: summarized rows with ``method``, ``n``, and ``kept_`` + dataset.
        titles: the two dataset names to their titles.
        message: what the figure says.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 1.4 + 0.55 * len(summary)), sharey=True)
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for y, line in enumerate(summary):
            own = [row for row in rows if row["method"] == line["method"]]
            for i, row in enumerate(own):
                lower = y + 0.16 * (i - (len(own) - 1) / 2)  # a seed a line
                axes.plot(
                    row[f"draws_{name}"], [lower] * len(row[f"draws_{name}"]), _MARKERS[i % 8], color=BEFORE, ms=4,
                    alpha=0.6, label="one draw (a line a seed)" if y == i == 0 else None,
                )  # fmt: skip
            kept = line[f"kept_{name}"]
            axes.errorbar(
                kept["mean"], y, xerr=kept["half"], fmt="D", ms=7, capsize=3, color=AFTER, zorder=3,
                label="mean of all" if y == 0 else None,
            )  # fmt: skip
        axes.axvline(100, color="0.5", ls=":", lw=1)
        axes.set(xlabel="kept: after / before (%)", title=f"on {title}", ylim=(len(summary) - 0.5, -0.5))
        axes.title.set_fontweight("normal")
    panels[0].set_yticks(range(len(summary)), [f"{row['method']} (n = {row['n']})" for row in summary])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncol=2)
    return _message(figure, message)


def number_of_networks(rows: Sequence[dict], message: str) -> Figure:
    """What each task keeps when one network after another joins the sum, a panel a method.

    Args:
        rows: dicts with ``method``, ``networks`` (how many are summed), ``task`` and ``kept`` (percent).
        message: what the figure says.
    """
    methods, tasks = (list(dict.fromkeys(row[k] for row in rows)) for k in ("method", "task"))
    figure, panels = plt.subplots(1, len(methods), figsize=(4.6 * len(methods), 3.8), sharey=True, squeeze=False)
    for axes, method in zip(panels[0], methods, strict=True):
        for i, task in enumerate(tasks):
            own = [row for row in rows if (row["method"], row["task"]) == (method, task)]
            axes.plot([r["networks"] for r in own], [r["kept"] for r in own], marker=_MARKERS[i], ms=6, label=task)
        axes.axhline(100, color="0.5", ls=":", lw=1)
        axes.set(xlabel="networks in the sum", ylim=(0, 105), title=method)
        axes.title.set_fontweight("normal")
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    panels[0, 0].set_ylabel("kept: after / before (%), seed 0")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncol=4)
    return _message(figure, message)


def examples(datasets: Sequence, message: str, each: int = 10) -> Figure:
    """The first test image of each class, a row a dataset.

    Args:
        datasets: :class:`~weightsum_lib.data.Dataset` objects.
        message: what the figure says.
        each: classes shown.
    """
    figure, grid = plt.subplots(len(datasets), each, figsize=(each * 0.8, 0.95 * len(datasets) + 0.5), squeeze=False)
    for row, dataset in zip(grid, datasets, strict=True):
        for label, axes in enumerate(row):
            index = int((dataset.test_labels == label).int().argmax())
            axes.imshow(dataset.test_images[index].permute(1, 2, 0).cpu().numpy())
            axes.set(xticks=[], yticks=[])
        kind = "" if dataset.source == "real" else "\n(stand-in)"
        row[0].set_ylabel(f"{DATASETS[dataset.name]}{kind}", fontsize=9, rotation=0, ha="right", va="center")
    return _message(figure, message)


def speed(rows: Sequence[dict], device: str) -> Figure:
    """How long each way of making a step takes, as a multiple of the floor.

    Args:
        rows: with ``setting``, ``way``, ``label``, ``ratio_to_floor`` and its ``ratio_quartiles``.
        device: what it was measured on.
    """
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, all_axes = plt.subplots(1, len(settings), figsize=(3.4 + 2.6 * len(settings), 3.6), sharey=True)
    for axes, setting in zip(np.atleast_1d(all_axes), settings, strict=True):
        shown = [row for row in rows if row["setting"] == setting]
        for y, row in enumerate(shown):
            ratio, ends = row["ratio_to_floor"], row["ratio_quartiles"]
            axes.barh(y, ratio, color=AFTER if row["way"].startswith("ours") else BEFORE, alpha=0.85, height=0.6)
            axes.plot(ends, [y, y], color="0.2", lw=2)
            axes.annotate(
                f"{ratio:.2f}", (max(ratio, ends[1]), y), xytext=(4, -3), textcoords="offset points", fontsize=9
            )
        axes.axvline(1, color="0.3", ls=":", lw=1)
        axes.set_yticks(range(len(shown)), [row["label"].replace("`", "") for row in shown])
        axes.set(ylim=(len(shown) - 0.5, -0.5), xlabel="time of a step / floor", title=setting.partition(", ")[2])
        axes.title.set(fontweight="normal", fontsize=10)
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
    ratios = sorted(row["ratio_to_floor"] for row in rows if row["way"] == "ours")
    between = f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if len(ratios) > 1 else f"{ratios[0]:.2f}"
    return _message(figure, f"The three-term step takes {between} times as long as its floor ({device})")
