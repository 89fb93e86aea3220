"""The front page's tables, figure and provenance, from the results of all notebooks; and the published run."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import yaml

from weightsum_lib.report import plots
from weightsum_lib.report.findings import answer, judge, shares, verdict_of
from weightsum_lib.report.tables import Interval, as_json, data_notice, table, title
from weightsum_lib.study import params, store
from weightsum_lib.study.params import ALONE, BASELINE, DISJOINT, RANDOM, TRAINED

_NOTEBOOKS = ("01_mnist_cifar10", "02_svhn_cifar10", "03_mnist_svhn", "04_what_transfers", "05_beside_others")
_ANSWERS = (  # the two networks, the tasks that tested them, the row
    ("with CIFAR-10, trained apart", ("Task 1", "Task 2"), BASELINE),
    ("with CIFAR-10, trained to be added", ("Task 1", "Task 2"), TRAINED),
    ("MNIST + SVHN, each trained alone", ("Task 3",), BASELINE),
    ("MNIST + SVHN, each trained to be added", ("Task 3",), TRAINED),
    ("MNIST + SVHN, plain, random keys of ⅛", ("Task 3",), ALONE),
    ("MNIST + SVHN, the recipe, random keys of ⅛", ("Task 3",), RANDOM),
    ("MNIST + SVHN, disjoint keys of ¼", ("Task 3",), DISJOINT),
)


def write_headline(folder: Path, target: Path) -> None:
    """Write ``headline.json`` and ``headline.png`` into ``target`` from the results in ``folder``.

    Each notebook offers rows for the headline: task, method, accuracy before and after (intervals), n.
    Notebooks that have no results are left out; the pages that quote them say so.

    Raises:
        RuntimeError: no notebook has any.
    """
    found = {name: content for name in _NOTEBOOKS if (content := store.read_json(folder / f"{name}.json"))}
    rows = pd.DataFrame([row for content in found.values() for row in content["headline"]])
    if rows.empty:
        why = f"no front page without results; {folder}/<notebook>.ipynb say why they failed"
        raise RuntimeError(f"{why}. Run them again: make notebooks PROFILE={folder.name}")
    rows = rows.map(lambda cell: Interval(**cell) if isinstance(cell, dict) else cell)
    rows = rows.assign(verdict=rows.apply(verdict_of, axis=1), tested=rows["task"].str.split(": ").str[-1])
    kinds = {pair: rows[(rows["method"] == row) & rows["task"].str.startswith(of)] for pair, of, row in _ANSWERS}
    kinds = pd.concat(kinds, names=["networks"]).set_index("tested", append=True).droplevel(1)
    made = [content["provenance"] for content in found.values()]
    last, runs = made[-1], {run: seconds for of in made for run, seconds in of["training_seconds"].items()}  # each once
    measured = {at: each for of in made for at, each in of["measuring_seconds"].items()}
    data = {name: about for of in made for name, about in of["data"].items()}
    tables = {"answer": _answer(kinds), "claims": _claims(found), "data": _data(data)}
    tables["headline"] = table(rows.set_index(["task", "method"]), ["before", "after", "gap", "other"])
    values = {"data_notice": data_notice(data), "run_notice": _run_notice(last)}
    values["answer"], values["price"] = answer(rows, found)
    train, test = (f"{sum(of.values()) / 60:,.1f}" for of in (runs, measured))
    values["times"] = f"{len(runs)} runs took {train} minutes of one process to train, {test} to test, others beside it"
    alone = {path.stem: store.read_json(path) or {} for path in target.glob("*_[0-9][0-9].json")}
    values |= {f"{name}_notice": _run_notice(kept["provenance"]) for name, kept in alone.items() if kept}
    values["larger"] = alone.get("day_04", {}).get("values", {}).get("finding", "")
    larger = _claims({name: alone.get(f"day_{name[:2]}", {}) for name in _NOTEBOOKS})
    tables["larger"] = larger[larger["n"] != "–"]
    content = {"notebook": "headline", "profile": last["params"]["profile"], "provenance": last, "values": values}
    content["tables"] = {name: as_json(frame) for name, frame in tables.items()}
    store.write_json(target / "headline.json", content)
    recipe, plain = (shares(rows, "kept", "Task 3", method) for method in (RANDOM, ALONE))
    message = f"Sums of networks that never met keep, under random keys of ⅛, {recipe} by the recipe, {plain} without"
    plots.use_style()
    plots.save(plots.before_after(kinds, message), target / "headline.png")


def _run_notice(run: Mapping) -> str:
    """What a run was made with, from its provenance."""
    p, versions = run["params"], ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    seeds = "one seed" if p["seeds"] == 1 else f"up to {p['seeds']} seeds"
    return (
        f"Profile `{p['profile']}`: {p['arch'].upper()} at width {p['width']:g}, up to {p['train_images']:,} images of "
        f"each set, {p['epochs']} epochs of {p['epoch_images']:,}, tested on up to {p['test_images']:,}; "
        f"{seeds} a row; on {run['device']} in {run['precision']}, with {versions}, commit {run['commit']}."
    )


def open_with(notebook: Path, opening: Path) -> None:
    """Put a text in the place of an executed notebook's first cell."""
    content = store.read_json(notebook)
    content["cells"][0]["source"] = opening.read_text(encoding="utf-8")
    store.write_json(notebook, content)


def _answer(kinds: pd.DataFrame) -> pd.DataFrame:
    """A line a kind of pair: accuracy before and after the sum, and what that makes of the skill."""
    ends = kinds.apply(lambda row: f"{row['before'].mean:.1f} → {row['after'].mean:.1f}", axis=1)
    shown = ends.unstack(fill_value="–", sort=False).add_suffix(": before → after (%)")
    for networks, said in kinds["verdict"].groupby("networks"):
        each = [f"{task}: {verdict}" for (_, task), verdict in said.items()]
        shown.loc[networks, "Their sum"] = "; ".join(each) if said.nunique() > 1 else said.iloc[0]
    return shown.rename_axis(index="Two networks", columns=None).reset_index()


def _claims(found: Mapping[str, dict]) -> pd.DataFrame:
    """Each claim of ``params/claims.yaml`` with its target, what was found, and the verdict."""
    lines = []
    for says, bounds in params.claims().items():
        page, _, key = bounds.pop("value").partition(":")
        cell = (at := found.get(page, {}).get("intervals", {}).get(key)) and Interval(**at)
        target = f"≥ {bounds['at_least']:g}" if "at_least" in bounds else f"≤ {bounds['at_most']:g}"
        lines.append([says, target, *((f"{cell:.2f}", cell.n) if cell else "––"), judge(cell, **bounds)])
    return pd.DataFrame(lines, columns=["Claim", "Target", "Found (95 % interval)", "n", "Verdict"])


def _data(data: Mapping[str, dict]) -> pd.DataFrame:
    rows = []
    for name, d in data.items():
        images = [f"{d['images'][split]:,}" for split in ("train", "val", "test")]
        rows.append([title(name), f"{d['source']}: {d['note']}", *images, d["checksum"][:16] + "…"])
    return pd.DataFrame(rows, columns=["Dataset", "Source", "Training", "Validation", "Test", "SHA-256 of the file"])


def publish(files: Mapping[str, Path], target: Path) -> None:
    """Keep a finished run as the published one.

    Args:
        files: what to keep, by name: executed notebooks, their results, the measured speed.
        target: ``book/published``; what was there is replaced.
    """
    aside = target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, path in files.items():
        (aside / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, aside / name)
    write_headline(aside, aside)
    params = store.read_json(aside / "headline.json")["provenance"]["params"]
    text = "# The parameters of this run, overrides included.\n" + yaml.safe_dump(params, sort_keys=False)
    (aside / "params.yaml").write_text(text, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def write_readme(published: Path, readme: Path) -> None:
    """Bring the README's headline up to date with a published run."""
    head, _, rest = readme.read_text(encoding="utf-8").partition(_BEGIN)
    readme.write_text(head + _BEGIN + readme_headline(published) + rest[rest.index(_END) :], encoding="utf-8")


_BEGIN, _END = "<!-- headline: from book/published -->\n", "<!-- /headline -->\n"


def readme_headline(published: Path) -> str:
    """The README's figure and table, in Markdown, from the published run."""
    content = store.read_json(published / "headline.json")
    values, shown = content["values"], content["tables"]["answer"]
    lines = [shown["columns"], ["---"] * len(shown["columns"]), *shown["rows"]]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    figure = "![Test accuracy before and after the sum, a line a pair of networks](book/published/headline.png)"
    made_with = f"{values['run_notice']} {values['data_notice'].replace('on this page', 'here')}"
    larger = f"With VGG16 and all training images: {values['larger']}"
    return f"**{values['answer']}** {values['price']}\n\n{figure}\n\n{table}\n\n{larger}\n\n{made_with}\n"
