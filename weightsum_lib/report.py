"""The front page's table, figure and provenance, from the results of all notebooks."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from weightsum_lib import cache, plots, results
from weightsum_lib.params import BASELINE, DATASETS, DISJOINT, RANDOM, TRAINED

_TASKS = ("01_mnist_cifar10", "02_svhn_cifar10", "03_mnist_svhn", "04_what_transfers")


def write_headline(folder: Path, target: Path) -> None:
    """Write ``headline.json`` and ``headline.png`` from the results in ``folder``.

    Each notebook offers rows for the headline: what is summed, accuracy before and after (intervals), n.
    Notebooks that have no results (they failed) are left out; the pages that quote them say so.
    """
    found = {name: cache.read_json(path) for name in _TASKS if (path := folder / f"{name}.json").exists()}
    rows = [row for content in found.values() for row in content["headline"]]
    if not rows:
        return
    columns = {
        "task": "Task",
        "networks": "Networks that are summed",
        "before": "Before the sum (%)",
        "after": "After the sum (%)",
        "gap": "Gap (points)",
        "control": "Control: the other network alone (%)",
        "n": "n",
    }
    figure_rows = [{**row, "method": f"{row['task']}: {row['networks'].replace('θ of ', '')}"} for row in rows]
    kept = [r for r in rows if results.verdict(r["before"]["mean"], r["after"]["mean"]) == results.KEEPS]
    message = f"{len(kept)} of {len(rows)} sums keep 99 % of the accuracy that the network had before"
    plots.use_style()
    target.mkdir(parents=True, exist_ok=True)
    figure = plots.before_after(figure_rows, message, "")
    # no date or version inside: the same results give the same file
    figure.savefig(target / "headline.png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    last = list(found.values())[-1]["provenance"]
    data = {k: v for content in found.values() for k, v in content["provenance"]["data"].items()}
    p = last["params"]
    content = {
        "notebook": "headline",
        "profile": p["profile"],
        "values": {
            "data_notice": results.data_notice(data),
            "run_notice": (
                f"Profile `{p['profile']}`: {p['arch'].upper()} at width {p['width']}, up to {p['train_images']:,} "
                f"images of each set, {p['epochs']} epochs of {p['epoch_images']:,} images, {p['seeds']} "
                f"seed{'s' if p['seeds'] > 1 else ''}, on {last['device']} in {last['precision']}."
            ),
        },
        "tables": {
            "answer": _answer(rows),
            "headline": results.as_json_table(results.table(rows, columns)),
            "data": {
                "columns": ["Dataset", "Source", "Training", "Validation", "Test", "SHA-256 of the file"],
                "rows": [
                    [
                        DATASETS[name],
                        f"{d['source']}: {d['note']}",
                        *(f"{d['images'][s]:,}" for s in ("train", "val", "test")),
                        d["checksum"][:16] + "…",
                    ]
                    for name, d in data.items()
                ],
            },
            "provenance": {
                "columns": ["What", "Value"],
                "rows": [
                    ["device", last["device"]],
                    ["precision of the forward pass", last["precision"]],
                    *([package, number] for package, number in last["versions"].items()),
                    ["commit of the code", last["commit"]],
                    *([k, str(v)] for k, v in p.items() if k not in ("methods", "parts", "data_dir", "results_dir")),
                    *([f"method: {label}", str(switches)] for label, switches in (p["methods"] | p["parts"]).items()),
                ],
            },
            "times": {
                "columns": ["Notebook", "Networks", "Training (minutes)", "Evaluation (minutes)"],
                "rows": _times({n: c["provenance"] for n, c in found.items()}),
            },
            "profiles": _profiles(folder),
        },
        "provenance": last,
    }
    cache.write_json(target / "headline.json", content)


_ANSWERS = (  # the two networks, the tasks that tested them, the row
    ("trained apart", ("Task 1", "Task 2"), BASELINE),
    ("trained to be added", ("Task 1", "Task 2"), TRAINED),
    ("that never met, each trained to be added to another", ("Task 3",), TRAINED),
    ("that never met, with random keys", ("Task 3",), RANDOM),
    ("that never met, with random keys in a sum four times as wide", ("Task 3",), results.SPARSE),
    ("that never met, with disjoint keys", ("Task 3",), DISJOINT),
)


def _answer(rows: list[dict]) -> dict:
    """The headline in five lines: accuracy before and after the sum, and what that makes of the skill."""
    titles = list(dict.fromkeys(row["task"].partition(": ")[2] for row in rows))
    lines = []
    for networks, tasks, method in _ANSWERS:
        of_method = [row for row in rows if row["method"] == method and row["task"].startswith(tasks)]
        by_title = {row["task"].partition(": ")[2]: row for row in of_method}
        if by_title:
            cells, verdicts = [], {}
            for title in titles:
                row = by_title.get(title)
                ends = [results.format_interval(row[end]) for end in ("before", "after")] if row else []
                cells.append(" → ".join(ends) or "–")
                if row:
                    verdicts[title] = results.verdict(row["before"]["mean"], row["after"]["mean"])
            same = len(set(verdicts.values())) == 1
            text = next(iter(verdicts.values())) if same else "; ".join(f"{t}: {v}" for t, v in verdicts.items())
            lines.append([networks, *cells, text])
    return {"columns": ["Two networks", *(f"{t}: before → after (%)" for t in titles), "Their sum"], "rows": lines}


def _times(provenances: dict[str, dict]) -> list[list[str]]:
    """What each notebook took, and all together: a network that several of them use is trained once."""
    runs = {n: p["training_seconds"] for n, p in provenances.items()}
    measuring = {n: p["measuring_seconds"] for n, p in provenances.items()}
    runs["all"] = {run: s for of_one in list(runs.values()) for run, s in of_one.items()}
    measuring["all"] = sum(measuring.values())
    return [
        [n, str(len(of_one)), f"{sum(of_one.values()) / 60:.1f}", f"{measuring[n] / 60:.1f}"]
        for n, of_one in runs.items()
    ]


def _profiles(folder: Path) -> dict:
    """The table of what each profile took that was run beside this one; a published run keeps its own."""
    kept = folder / "headline.json"
    if kept.exists():
        return cache.read_json(kept)["tables"]["profiles"]
    rows = []
    for profile in sorted(p for p in folder.parent.iterdir() if p.is_dir()):
        found = {n: cache.read_json(path)["provenance"] for n in _TASKS if (path := profile / f"{n}.json").exists()}
        if len(found) == len(_TASKS) and all("measuring_seconds" in p for p in found.values()):  # not of older code
            last = found[_TASKS[-1]]
            rows.append([last["params"]["profile"], last["device"], *_times(found)[-1][1:]])
    return {"columns": ["Profile", "Device", "Networks", "Training (minutes)", "Evaluation (minutes)"], "rows": rows}


def publish(files: Sequence[Path], folder: Path, target: Path, readme: Path) -> None:
    """Keep a finished run as the published one, and bring the README's headline up to date.

    Args:
        files: what to keep: executed notebooks, their results, the measured speed.
        folder: the profile's results.
        target: ``book/published``; what was there is replaced.
        readme: the README.
    """
    aside = target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, aside / path.name)
    write_headline(folder, aside)
    params = cache.read_json(aside / "headline.json")["provenance"]["params"]
    text = "# The parameters of this run, overrides included.\n" + yaml.safe_dump(params, sort_keys=False)
    (aside / "params.yaml").write_text(text, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    head, rest = readme.read_text(encoding="utf-8").split(_BEGIN)
    tail = rest.split(_END)[1]
    readme.write_text(head + _BEGIN + readme_headline(target) + _END + tail, encoding="utf-8")


_BEGIN, _END = "<!-- headline: from book/published -->\n", "<!-- /headline -->\n"


def readme_headline(published: Path) -> str:
    """The README's table and figure, in Markdown, from the published run."""
    content = cache.read_json(published / "headline.json")
    values = content["values"]
    tables = []
    for table in (content["tables"][name] for name in ("answer", "headline")):
        lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
        tables.append("\n".join("| " + " | ".join(cells) + " |" for cells in lines))
    return (
        "\n\n".join(tables)
        + "\n\n![Test accuracy before and after the sum, a line a pair of networks](book/published/headline.png)\n\n"
        + f"{values['run_notice']} {values['data_notice'].replace('on this page', 'in this table')}\n"
    )
