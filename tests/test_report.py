import itertools
import json
import pkgutil
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import weightsum_lib
from weightsum_lib.report import findings, page, plots, tables
from weightsum_lib.report.tables import Interval, interval
from weightsum_lib.run import notebook_names
from weightsum_lib.study import params, store
from weightsum_lib.study.params import Method

NBSP = "\N{NO-BREAK SPACE}"


def measured(method, seed, network, name, accuracy, policy="union", draw=0, confidence=50.0):
    """A row of the long frame."""
    return {
        "task": "3", "method": method, "seed": seed, "share": 1.0, "narrow": 0, "draw": draw, "policy": policy,
        "network": network, "tested": name, "split": "test", "accuracy": accuracy, "confidence": confidence,
        "sampling": 0.5, "shared": np.nan,
    }  # fmt: skip


def strangers(method, seed, policy="union", mnist=98.0, svhn=80.0, kept=0.5, draw=0):
    """What is measured of one pair: each network on both tasks, the sum, the ensemble, and the sum with other names."""
    before = {"mnist": mnist, "svhn": svhn}
    rows = [measured(method, seed, n, t, before[n] if n == t else 20.0, "own") for n in before for t in before]
    rows += [measured(method, seed, "ensemble", t, (1 + kept) / 2 * before[t], "own") for t in before]
    for network, factor in (("sum", kept), ("renamed", kept - 0.1)):
        rows += [measured(method, seed, network, t, factor * before[t], policy, draw) for t in before]
    return rows


def pair(method, seed, before, after, support=60.0):
    rows = [("mnist", "mnist", before), ("sum", "mnist", after), ("cifar10", "cifar10", support)]
    rows += [("cifar10", "mnist", 9.0), ("mnist", "cifar10", 11.0), ("sum", "cifar10", 30.0)]
    return [measured(method, seed, *row, policy="per_task" if row[0] == "sum" else "own") for row in rows]


PAIRS = pd.DataFrame(
    [row for s in range(3) for row in pair("independent", s, 98.0 + s, 12.0 + s)]
    + [row for s in range(3) for row in pair("joint ce", s, 98.0, 97.0 + s / 2, 56.0)]
)


@pytest.fixture(scope="module")
def pairs():
    return tables.wide(PAIRS)


def on_mnist(rows):
    return tables.summarize(rows.xs("mnist", level="tested"), ["method"])


def test_an_interval_is_students_t_and_of_a_percentage_on_the_logit_scale():
    of = interval([-1.0, 0.0, 1.0])
    assert of.mean == 0.0 and of.n == 3
    assert (of.low, of.high) == pytest.approx((-4.303 / 3**0.5, 4.303 / 3**0.5), rel=1e-3)
    assert interval([5.0, np.nan]) == (5.0, None, None, 1) and interval([np.nan]) is None
    values = np.array([99.0, 99.5, 97.0])
    of = interval(values, percent=True)
    logits = np.log(values / (100 - values))
    ends = logits.mean() + np.array([-1, 1]) * 4.303 * logits.std(ddof=1) / 3**0.5
    assert (of.low, of.high) == pytest.approx(tuple(100 / (1 + np.exp(-ends))), rel=1e-4)
    certain = interval([100.0, 100.0, 99.0], percent=True)
    assert 0 < certain.low < 99 < certain.mean < certain.high < 100


def test_an_interval_is_written_with_a_true_minus_and_spaces_that_do_not_break():
    assert f"{interval([-97.24])}" == str(interval([-97.24])) == "−97.2"
    assert f"{Interval(98.66, 98.0, 99.04, 3)}" == f"98.7 (98.0{NBSP}to{NBSP}99.0)"
    assert f"{Interval(-0.001, -0.004, 0.1, 3):.2f}" == f"0.00 (0.00{NBSP}to{NBSP}0.10)"


@pytest.mark.parametrize(
    ("found", "answer"),
    [((99, 98.5, 99.5, 3), "reached"), ((98.2, 97, 99, 3), "undecided"), ((97, 96, 97.9, 3), "missed"),
     ((100, None, None, 1), "undecided")],
)  # fmt: skip
def test_a_verdict_needs_the_whole_interval_on_one_side(found, answer):
    assert findings.judge(Interval(*found), 98) == answer
    turned = {"reached": "missed", "missed": "reached", "undecided": "undecided"}
    assert findings.judge(Interval(*found), at_most=98) == turned[answer]
    assert findings.judge(None, 98) == "undecided"


def test_a_wide_row_says_what_each_network_is_there(pairs):
    row = pairs.xs(("joint ce", 2, "mnist"), level=("method", "seed", "tested")).iloc[0]
    assert (row["before"], row["after"], row["other"]) == (98.0, 98.0, 9.0)
    row = pairs.xs(("independent", 1, "cifar10"), level=("method", "seed", "tested")).iloc[0]
    assert (row["before"], row["after"], row["other"]) == (60.0, 30.0, 11.0)
    assert (row["gap"], row["kept"]) == (30.0, 50.0) and np.isnan(row["ensemble"])
    assert row["sampling"] == 0.5
    row = tables.wide(pd.DataFrame(strangers("a", 0))).xs("svhn", level="tested").iloc[0]
    assert row[["before", "after", "other", "ensemble", "renamed"]].tolist() == [80.0, 40.0, 20.0, 60.0, 32.0]
    assert (row["loudness"], row["interference"], row["confidence"]) == (20.0, 20.0, 50.0)
    assert row["kept_of_ensemble"] == pytest.approx(100 * 40 / 60)


def test_wide_rows_are_those_of_the_frame_in_its_order():
    frame = pd.DataFrame(
        [
            row
            for m, s in itertools.product("zam", (0, 1))
            for row in strangers(m, s, mnist=90.0 + s, svhn=70.0 + ord(m))
        ]
    )
    found = tables.wide(frame)
    assert list(found.index.unique("method")) == ["z", "a", "m"] and list(found.index.unique("tested")) == [
        "mnist",
        "svhn",
    ]
    for _, row in frame.iterrows():
        column = {"sum": "after", "ensemble": "ensemble", "renamed": "renamed"}.get(row["network"])
        column = column or ("before" if row["network"] == row["tested"] else "other")
        (value,) = found.xs((row["method"], row["seed"], row["tested"]), level=("method", "seed", "tested"))[column]
        assert value == row["accuracy"]


def test_sums_without_what_they_are_compared_with_have_no_more_than_their_accuracy():
    rows = tables.wide(pd.DataFrame([measured("merger", s, "merged", "mnist", 50.0 + s) for s in (0, 1)]))
    assert rows["after"].tolist() == [50.0, 51.0] and rows[["before", "ensemble", "kept"]].isna().all(axis=None)
    summary = tables.summarize(rows, ["method", "tested"])
    assert tables.table(summary, ["kept"]).values.tolist() == [["merger", "–", "2"]]


def test_draws_share_their_networks_and_count_as_one_seed():
    rows = strangers("a", 0, kept=0.4) + [
        measured("a", 0, "sum", t, v, draw=1) for t, v in (("mnist", 98.0), ("svhn", 48.0))
    ]
    found = tables.wide(pd.DataFrame(rows + strangers("a", 1, kept=0.6)))
    assert found["before"].notna().all() and found["other"].notna().all()
    summary = tables.summarize(found, ["method", "tested"])
    assert summary["kept"]["a", "svhn"].mean == pytest.approx((50 + 60) / 2) and summary["n"]["a", "svhn"] == 2
    assert summary["worst"]["a", "svhn"] == pytest.approx(40)  # of all draws
    assert summary["spread"]["a", "svhn"] == pytest.approx(20 / 2**0.5)  # of 40 and 60, the draws of seed 0


def test_a_paired_difference_uses_the_seeds_that_both_have(pairs):
    rows = pairs.xs("mnist", level="tested")
    rows = rows[(rows.index.get_level_values("method") != "independent") | (rows.index.get_level_values("seed") < 2)]
    of = tables.paired(rows, "independent", "joint ce", "before")
    assert of.mean == 0.5 and of.n == 2


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (98.5, 98.3, "keeps the skill"),
        (98, 92, "nearly keeps the skill"),
        (98, 50, "keeps a part of the skill"),
        (98, 20, "loses the skill"),
        (15, 16, "had no skill to keep"),
    ],
)
def test_verdict_follows_the_numbers(before, after, words):
    assert findings.verdict(before, after) == words


def test_the_finding_on_a_pair_turns_with_the_numbers(pairs):
    text = findings.of_pair(on_mnist(pairs), pairs, "yes", "MNIST")
    assert text.startswith("Trained to be added, the sum keeps the skill: it reads 97.5") and "alone? yes)" in text
    assert "trained apart loses the skill: 13.0" in text
    worse = tables.wide(PAIRS.assign(accuracy=PAIRS["accuracy"].where(PAIRS["network"] != "sum", 15.0)))
    text = findings.of_pair(on_mnist(worse), worse, "no", "MNIST")
    assert "alone? no)" in text and "the sum loses the skill" in text
    assert (
        "alone? undecided)" in findings.of_pair(on_mnist(pairs), pairs, "undecided", "MNIST")
        and "Fine-tuned" not in text
    )
    starts = {"the sum": [13.0, 14.0, 15.0], "θ_main": [14.0, 16.0, 18.0], "random weights": [12.0, 12.0, 12.0]}
    tuned = [
        row
        for start, after in starts.items()
        for s in range(3)
        for row in pair(f"sequential, from {start}", s, 98.0, after[s])
    ]
    rows = tables.wide(pd.concat([PAIRS, pd.DataFrame(tuned)]))
    text = findings.of_pair(on_mnist(rows), rows.xs("mnist", level="tested"), "yes", "MNIST")
    assert "Fine-tuned for as many steps, that sum reads 14.0" in text
    told = text.replace("\N{NO-BREAK SPACE}", " ")
    assert "against its MNIST network fine-tuned alike that is −2.0 (−4.5 to 0.5) points" in told
    assert told.endswith("against random weights 2.0 (−0.5 to 4.5).")
    one = tables.wide(PAIRS[PAIRS["seed"] == 0])
    assert findings.of_pair(on_mnist(one), one, "yes", "MNIST").startswith(
        "In the one seed, trained to be added, the sum"
    )


def test_what_counts_is_not_inferior_by_the_end_of_its_interval(pairs):
    rows = pairs.copy()
    assert findings.counts(rows, "joint ce", "independent", {"mnist": 1.0}) == "undecided"  # 0, −1, −2
    assert findings.counts(rows, "joint ce", "independent", {"mnist": 4.0}) == "yes"
    assert findings.counts(rows, "joint ce", "independent", {"mnist": 4.0, "cifar10": 3.0}) == "no"  # −4 each time
    one = rows[rows.index.get_level_values("seed") == 0]
    assert findings.counts(one, "joint ce", "independent", {"mnist": 4.0}) == "undecided"  # one seed decides nothing


def test_the_finding_on_strangers_says_what_each_kind_keeps():
    frame = [
        row
        for m, k in (
            ("independent", 0.3),
            ("joint ce", 0.2),
            ("keys alone", 0.4),
            ("random keys", 0.9),
            ("disjoint keys", 1),
        )
        for row in strangers(m, 0, kept=k)
    ]
    for draw, each in ((1, {"mnist": 0.8, "svhn": 0.9}), (2, {"mnist": 0.9, "svhn": 0.7})):
        drawn = [
            row for n, k in each.items() for row in strangers("random keys", 0, kept=k, draw=draw) if row["tested"] == n
        ]
        frame += [row for row in drawn if row["network"] in ("sum", "renamed")]
    counted = {"random keys": "undecided", "disjoint keys": "yes"}
    text = findings.of_strangers(tables.summarize(tables.wide(pd.DataFrame(frame)), ["method", "tested"]), counted)
    for words in ("added to a CIFAR-10 network, the sum keeps 20.0 % of MNIST and 20.0 % of SVHN",
                  "trained alone, the sum keeps 30.0 %", "the recipe, the sum keeps 86.7 % of MNIST and 83.3 % of SVHN",
                  "added as they are, the sum keeps 100.0 %", "for each task keeps 80.0 % of MNIST and 70.0 % of SVHN.",
                  "By the recipe: undecided; under disjoint keys: yes"):  # fmt: skip
        assert words in text


def test_the_finding_on_the_recipe_says_what_is_kept_with_it_and_without():
    def kept(*values):
        index = pd.MultiIndex.from_product([[1 / 8, 1 / 128], ["mnist", "svhn"]], names=["share", "tested"])
        return pd.Series([interval([v]) for v in values], index)

    three = pd.Series([interval([v]) for v in (97, 70, 60)], pd.Index(["mnist", "svhn", "cifar10"], name="tested"))
    text = findings.of_recipe(kept(99, 98, 100, 100), kept(70, 60, 90, 65), (1 / 8, 1 / 128), three)
    assert "under random keys of 1/8, two networks that never met keep 99.0 % of MNIST and 98.0 % of SVHN;" in text
    assert "of 1/128, 100.0 % of MNIST" in text and "plainly keep 70.0 % of MNIST and 60.0 % of SVHN; under" in text
    assert text.endswith("keep 97.0 % of MNIST, 70.0 % of SVHN and 60.0 % of CIFAR-10.")


def test_the_price_is_what_a_twin_of_the_same_seed_can_do_more():
    frame = [
        row
        for m, before in (("full", 99.0), ("small", 97.5), ("keyed", 96.0))
        for row in strangers(m, 0, "union", before)
    ]
    frame += strangers("keyed", 1, "union", 90.0)
    priced = tables.price(
        tables.wide(pd.DataFrame(frame)), {"full": "full", "small": "small", "keyed": "small"}, "full"
    )
    assert tables.summarize(priced, ["method", "tested"])["gap_size"]["keyed", "mnist"] == (1.5, None, None, 1)
    priced = priced.xs("mnist", level="tested").reset_index().set_index(["method", "seed"])
    assert priced.loc[("keyed", 0), ["before", "gap_full", "gap_size"]].tolist() == [96.0, 3.0, 1.5]
    assert ("keyed", 1) not in priced.index  # no twin has that seed
    assert priced["gap_full"]["full", 0] == 0.0


def test_the_switches_of_a_row_are_those_that_are_not_at_their_default():
    method = Method(protocol="joint", keys="random", quiet=1.0, network_width=0.25, sum_width=4.0, seeds=1)
    assert method.in_words() == ["joint", "quiet 1.0", "keys random", "network_width 0.25", "sum_width 4.0"]


def test_parts_are_compared_with_the_recipe_seed_by_seed():
    frame = [r for s in (0, 1) for m, k in (("recipe", 0.9 + s / 100), ("part", 0.8)) for r in strangers(m, s, kept=k)]
    found = tables.against(tables.wide(pd.DataFrame(frame)), "recipe", ["before", "kept"])
    assert (
        found["difference"]["part", "mnist"].mean == pytest.approx(-10.5)
        and found["difference"]["part", "mnist"].n == 2
    )
    assert found["difference"]["recipe", "svhn"].mean == 0


def test_the_room_of_a_sum_is_told_layer_by_layer():
    room = pd.DataFrame([
        {"share": k, "layer": f"features.{name}", "channels": n, "room": n / k, "shared": n * k, "used": 2**20 / k}
        for k in (1 / 2048, 1 / 8) for name, n in (("conv1", 8), ("fc1", 512))
    ])  # fmt: skip
    shown = tables.room_table(room)
    assert list(shown) == ["Layer (channels)", "k = 1/8", "k = 1/2048"]
    sizes = ["Sum as its used channels (MiB)", "8", "2,048"]
    assert shown.values.tolist() == [["conv1 (8)", "1", "0.003906"], ["fc1 (512)", "64", "0.25"], sizes]


def test_a_table_has_its_levels_first_tasks_side_by_side_and_n_last(pairs):
    summary = tables.summarize(pairs, ["method", "tested"])
    shown = tables.table(
        summary.loc[["joint ce"]].map(lambda v: interval([v.mean]) if isinstance(v, Interval) else v), ["before", "gap"]
    )
    assert shown.to_dict("records") == [{
        "Method": "joint ce", "MNIST: before the sum (%)": "98.0", "MNIST: gap (points)": "0.50",
        "CIFAR-10: before the sum (%)": "56.0", "CIFAR-10: gap (points)": "26.00", "n": "3",
    }]  # fmt: skip
    shown = tables.table(on_mnist(pairs).assign(counts=["yes", "no"]), ["ensemble", "counts"])
    assert shown.values.tolist() == [["independent", "–", "yes", "3"], ["joint ce", "–", "no", "3"]]
    assert list(shown) == ["Method", "Ensemble of logits (%)", "Counts", "n"]


def test_the_rows_of_a_notebooks_table_that_matter_are_marked(pairs):
    html = tables.shown(tables.table(on_mnist(pairs), ["after"]), "On MNIST", marked=["joint ce"]).to_html()
    assert "On MNIST" in html and bold(html) == {"row1"}  # of two


def bold(html):
    """The rows of a table that are marked."""
    (marked,) = re.findall(r"((?:#T_\w+_row\d+_col\d+,? ?)+){\s*font-weight: bold", html.replace("\n", ""))
    return {*re.findall(r"row\d+", marked)}


def test_what_prose_and_front_page_read_is_in_the_results_file(pairs, tmp_path):
    class Study:
        params, results = params.read("smoke"), tmp_path

        def provenance(self):
            return {"commit": "abc"}

    summary = tables.summarize(pairs, ["method", "tested"])
    rows = tables.headline(summary.xs("mnist", level="tested", drop_level=False), "Task 1")
    both = tables.headline(summary, "Task 1")  # those of one tested task after those of another
    assert rows == both[:2] and [row["task"] for row in both] == 2 * ["Task 1: MNIST"] + 2 * ["Task 1: CIFAR-10"]
    found = tables.intervals_of(summary)
    tables.save("01_x", Study(), {"x": 1}, {"t": tables.table(summary, ["after"])}, rows, found, pairs)
    saved = json.loads((tmp_path / "smoke" / "01_x.json").read_text(encoding="utf-8"))
    assert saved["values"]["joint_ce.after_mnist"] == 97.5 and "joint_ce.ensemble_mnist" not in saved["values"]
    assert (
        saved["values"]["x"] == 1
        and Interval(**saved["intervals"]["joint_ce.after_mnist"]) == found["joint_ce.after_mnist"]
    )
    again = pd.DataFrame(saved["rows"]["data"], columns=saved["rows"]["columns"])
    after = again[(again["method"] == "joint ce") & (again["tested"] == "mnist")]["after"]
    assert interval(after, percent=True) == pytest.approx(found["joint_ce.after_mnist"])
    assert saved["tables"]["t"]["rows"][1][0] == "joint ce" and saved["provenance"] == {"commit": "abc"}
    assert saved["headline"][1]["method"] == "joint ce" and saved["headline"][1]["n"] == 3
    assert Interval(**saved["headline"][1]["other"]) == interval([9.0] * 3)


def test_a_page_says_which_data_it_was_made_from():
    images = {"train": 9000, "val": 1000, "test": 10}
    real = {"source": "real", "note": "exact", "images": images}
    text = tables.data_notice({"mnist": real})
    assert "MNIST: real (9,000 training images; exact)" in text and "not numbers" not in text
    text = tables.data_notice({"mnist": real, "svhn": {**real, "source": "stand-in"}})
    assert "SVHN: **synthetic stand-in**" in text and "not numbers of the real dataset" in text


def test_the_front_page_is_made_from_results_and_says_what_they_say(tmp_path):
    def row(method, after):
        cells = {"before": 98.0, "after": after, "gap": 98.0 - after, "kept": after / 0.98, "other": 9.0}
        shown = {"task": "Task 1: MNIST", "method": method, "n": 1}
        return shown | {name: interval([value])._asdict() for name, value in cells.items()}

    provenance = {
        "params": {
            "profile": "p", "arch": "vgg8", "width": 1.0, "train_images": 10, "test_images": 5, "epochs": 1, "epoch_images": 9,
            "seeds": 1, "rows": {"joint ce": {"protocol": "joint"}}, "parts": {},
        },
        "data": {
            "mnist": {"source": "real", "note": "exact", "checksum": "ab", "images": {"train": 9, "val": 1, "test": 5}}
        },
        "device": "CPU", "precision": "float32", "versions": {"torch": "2"}, "commit": "abc",
        "training_seconds": {"run": 60.0}, "measuring_seconds": {"measurement": 30.0},
    }  # fmt: skip
    content = {"headline": [row("joint ce", 97.5), row("independent", 11.0)], "provenance": provenance}
    content["intervals"] = {"joint_ce.gap_mnist": Interval(0.05, 0.02, 0.08, 3)._asdict()}
    content["values"] = {"joint_ce.after_cifar10": 9.1}
    with pytest.raises(RuntimeError, match=r"no front page without results.*make notebooks"):
        page.write_headline(tmp_path, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "01_mnist_cifar10.json").write_text(json.dumps(content))
    # strangers, of which one reads the other's digits: with its classes renamed nothing is left
    helped = row("joint ce", 45.0) | {"task": "Task 3: MNIST", "renamed": interval([12.0])._asdict()}
    (tmp_path / "03_mnist_svhn.json").write_text(json.dumps({**content, "headline": [helped], "intervals": {}}))
    wide = {**content, "intervals": {"joint_ce.gap_mnist": Interval(0.5, 0.2, 0.8, 2)._asdict()}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "day_01.json").write_text(json.dumps(wide))  # a page that stands in every report
    page.write_headline(tmp_path, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "headline.json").read_text())
    assert content["values"]["day_01_notice"] == content["values"]["run_notice"]
    made, notice = content["tables"], content["values"]["run_notice"]
    assert content["values"]["answer"].startswith("Added, two networks that were trained apart keep 11.2 % of MNIST;")
    assert "of CIFAR-10 itself the sum of task 1 reads 9 %, by chance 10" in content["values"]["price"]
    assert notice.startswith("Profile `p`: VGG8 at width 1,") and notice.endswith("float32, with torch 2, commit abc.")
    assert made["headline"]["rows"][0] == ["Task 1: MNIST", "joint ce", "98.0", "97.5", "0.50", "9.0", "1"]
    assert made["answer"]["rows"] == [
        ["with CIFAR-10, trained apart", "98.0 → 11.0", "loses the skill"],
        ["with CIFAR-10, trained to be added", "98.0 → 97.5", "keeps the skill"],
        ["MNIST + SVHN, each trained to be added", "98.0 → 45.0", "loses the skill"],
    ]
    claims = {row[0]: row[1:] for row in made["claims"]["rows"]}
    ends = f"0.05 (0.02{NBSP}to{NBSP}0.08)"
    assert claims["Task 1 (joint ce), gap on MNIST"] == ["≤ 0.1", ends, "3", "reached"]
    assert claims["Task 2 (joint ce), gap on SVHN"] == ["≤ 1", "–", "–", "undecided"]
    (larger,) = made["larger"]["rows"]  # of one page
    assert larger[2:] == [f"0.50 (0.20{NBSP}to{NBSP}0.80)", "2", "missed"]
    assert made["data"]["rows"] == [["MNIST", "real: exact", "9", "1", "5", "ab…"]]
    first = (tmp_path / "out" / "headline.png").read_bytes()
    page.write_headline(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "headline.png").read_bytes() == first


LAYERS = pd.DataFrame(
    [
        {"method": m, "layer": layer, "norm_ratio": 1.1, "cosine": 0.1, "explained": 0.5}
        for m in ("independent", "joint ce")
        for layer in ("conv1_1", "conv2_1", "fc3")
    ]
)
HISTORY = [{"epoch": e, **{f"{k}_{n}": 1.0 * e for k in ("loss", "val") for n in ("main", "support")}} for e in (1, 2)]


def test_the_law_of_capacity_is_found_again_and_held_to_what_it_was_not_fitted_to():
    cells = pd.MultiIndex.from_product([(2, 4, 8), (1 / 4, 1 / 8, 1 / 32)], names=["networks", "share"])
    true = findings.Law(0.4, 1.5)
    kept = pd.Series([true.kept(n, k) for n, k in cells], cells)
    law, table = findings.capacity(kept, (2, 4))
    assert law == pytest.approx(true, rel=1e-3)
    assert table["Part"].tolist() == ["fitted"] * 6 + ["predicted"] * 3
    most = law.networks(1 / 32, 99)
    assert law.kept(most, 1 / 32) >= 99 > law.kept(most + 1, 1 / 32)
    bent = kept.where(kept.index.get_level_values("networks") < 8, 50.0)
    assert findings.capacity(bent, (2, 4))[0] == law  # what it is held to has no part in it


def test_tables_of_each_task_stand_below_each_other():
    index = pd.MultiIndex.from_product([["a", "b"], ["mnist", "svhn"]], names=["method", "tested"])
    summary = pd.DataFrame({"after": [interval([float(v)]) for v in range(4)], "n": 1}, index)
    found = tables.by_task(summary, ["after"])
    assert list(found) == ["Task", "Method", "After the sum (%)", "n"]
    assert found["Task"].tolist() == ["MNIST", "MNIST", "SVHN", "SVHN"]
    assert found["After the sum (%)"].tolist() == ["0.0", "2.0", "1.0", "3.0"]
    assert bold(tables.shown(found, marked=["a"]).to_html()) == {"row0", "row2"}


def _figures():
    """Every figure, by name, with rows whose labels are as long as the longest of the study."""
    long = "disjoint keys without quiet, gradient to main only"
    frame = [row for m in ("joint ce", long) for s in (0, 1) for row in strangers(m, s, mnist=98.0 - s)]
    frame += [
        measured(m, s, "sum", t, 50.0 + d, draw=d)
        for m in ("joint ce", long)
        for s in (0, 1)
        for d in (1, 2)
        for t in ("mnist", "svhn")
    ]
    drawn = tables.wide(pd.DataFrame(frame))
    rows = drawn.xs(0, level="draw", drop_level=False)
    summary = tables.summarize(rows, ["method", "tested"])
    lines = pd.concat([drawn.rename({1.0: k}, level="share") for k in (1 / 2, 1 / 8, 1 / 128)])
    curves = tables.summarize(lines.rename_axis(index={"method": "line"}), ["line", "share", "tested"])
    layers = tables.summarize(drawn.rename_axis(index={"method": "layer"}), ["layer", "tested"])
    several = pd.concat({n: lines.rename({long: "random keys"}) for n in (2, 3)}, names=["networks"])
    policies = pd.concat([rows, rows.rename({"union": "by_owner"}, level="policy")])
    policies = tables.summarize(policies, ["method", "policy", "tested"]).xs("mnist", level="tested")["after"]
    grid = {"coefficients": [0.0, 0.5, 1.0, 1.5], **dict.fromkeys(("mnist", "svhn"), np.eye(4).tolist())}
    steps = pd.DataFrame(
        {"setting": setting, "way": way, "label": way, "ratio_to_floor": Interval(1.1, 1.0, 1.2, 3)}
        for setting in ("a, batch 1", "a, batch 2")
        for way in ("floor", "ours")
    )
    return {
        "before_after": plots.before_after(summary.assign(other=[*summary["other"][:3], None]), "message"),
        "of_one_task": plots.before_after(summary.xs("mnist", level="tested", drop_level=False), "message"),
        "curves": plots.curves({"joint ce": HISTORY, "random keys": HISTORY}, "MNIST", "CIFAR-10", "message"),
        "layers": plots.layers(LAYERS, LAYERS, "message"),
        "plane": plots.plane({"joint ce": grid}, ("mnist", "svhn"), "message"),
        "policies": plots.policies({"MNIST": policies}, ["by_owner", "per_task", "union"], "message"),
        "why": plots.why(LAYERS, summary, "message"),
        "curve": plots.kept_by_share(curves, "message"),
        "by_layer": plots.lost_by_layer(layers.rename({long: "classifier.fc1"}), "message"),
        "draws": plots.by_draw(drawn.assign(shared=0.1).rename_axis(index={"method": "line"}), "message"),
        "networks": plots.capacity(several, findings.Law(0.5, 1.0).kept, "message"),
        "speed": plots.speed(steps, "CPU"),
    }


@pytest.fixture(scope="module")
def figures():
    plots.use_style()
    return _figures()


def test_figures_have_a_message_and_axes_with_units_and_n(figures):
    said = {name: figure._suptitle.get_text() for name, figure in figures.items()}
    assert said.pop("speed") == "The three-term step takes 1.10 times as long as its floor (CPU)"
    assert set(said.values()) == {"message"}
    for name in ("before_after", "of_one_task"):
        label = figures[name].axes[0].get_xlabel()
        assert "accuracy (%)" in label and "n = 2 seeds, bars: 95 % interval" in label
    assert "points, n = 2 seeds" in figures["why"].axes[1].get_xlabel()
    assert [axes.get_ylabel() for axes in figures["curves"].axes[:2]] == [
        "training loss\n(nats)",
        "validation\naccuracy (%)",
    ]
    assert figures["layers"].axes[0].get_ylabel() == "‖W_main‖ / ‖W_support‖"
    assert "coefficient of θ of MNIST" in figures["plane"].axes[0].get_ylabel()
    shown = [t.get_text() for t in figures["policies"].axes[0].get_xticklabels()]
    assert shown == ["by\nowner", "union"]  # in their order, and none that no row has
    label = figures["curve"].axes[0].get_xlabel()
    assert "share of the sum's channels" in label and "n = 2 seeds, bars: 95 % interval" in label
    assert [t.get_text() for t in figures["curve"].axes[0].get_xticklabels()] == ["1/2", "1/8", "1/128"]
    assert "points lost" in figures["by_layer"].axes[0].get_ylabel()


def test_no_two_lines_of_a_figure_look_the_same():
    plots.use_style()
    rows = [{"method": f"m{i}", "layer": x, "norm_ratio": 1.0, "cosine": 0.0} for i in range(30) for x in ("a", "b")]
    lines = plots.layers(pd.DataFrame(rows), LAYERS, "message").axes[0].get_lines()[:30]
    assert len({(line.get_marker(), line.get_color()) for line in lines}) == 30


def test_a_method_looks_the_same_in_every_panel():
    plots.use_style()
    explained = LAYERS[LAYERS["method"] == "joint ce"]  # without the first method
    panels = plots.layers(LAYERS, explained, "message").axes
    looks = {
        (line.get_color(), line.get_marker()) for p in panels for line in p.lines if line.get_label() == "joint ce"
    }
    assert len(looks) == 1


def test_examples_are_the_first_of_each_class_and_stand_ins_are_marked(datasets):
    figure = plots.examples(list(datasets.values()), "message")
    assert len(figure.axes) == 20 and figure.axes[10].get_ylabel() == "CIFAR-10\n(stand-in)"
    shown = figure.axes[13].images[0].get_array()
    first = datasets["cifar10"].test_images[3].permute(1, 2, 0)
    assert (shown == first.numpy()).all() and datasets["cifar10"].test_labels[3] == 3
    grey = plots.examples(list(datasets.values()), "message", 1).axes[13].images[0].get_array()
    assert np.abs(grey - first.numpy() @ [0.299, 0.587, 0.114]).max() < 1  # as a network of one input channel has it


def test_a_long_message_is_broken_into_lines_that_fit():
    plots.use_style()  # of every page; another would have other letters
    figure = plots.curves({"joint ce": HISTORY}, "MNIST", "CIFAR-10", "word " * 40)
    figure.draw_without_rendering()
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1


FIGURES = (
    "before_after",
    "of_one_task",
    "curves",
    "layers",
    "plane",
    "policies",
    "why",
    "curve",
    "by_layer",
    "networks",
    "speed",
)


def _texts(figure):
    """The boxes of a figure's message, legends, titles and labels, as far as they are drawn."""
    found = [figure._suptitle, *figure.legends]
    for axes in figure.axes:
        found += [axes.xaxis.label, axes.yaxis.label, axes._left_title]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [(t, t.get_window_extent().padded(-1)) for t in found if t.get_visible() and getattr(t, "_text", "a legend")]


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_of_a_figure_runs_into_another(figures, name):
    figures[name].draw_without_rendering()
    for (a, of_a), (b, of_b) in itertools.combinations(_texts(figures[name]), 2):
        assert not of_a.overlaps(of_b), (a, b)


PUBLISHED = Path(__file__).parent.parent / "book" / "published"


def test_the_readme_shows_the_published_numbers():
    readme = (PUBLISHED.parent.parent / "README.md").read_text(encoding="utf-8")
    assert page.readme_headline(PUBLISHED) in readme


def test_the_published_run_is_whole_and_names_its_data_and_commit():
    content = json.loads((PUBLISHED / "headline.json").read_text(encoding="utf-8"))
    assert content["provenance"]["commit"] not in ("", "unknown")
    for name, described in content["provenance"]["data"].items():
        assert described["source"] in ("real", "stand-in"), name
    for path in PUBLISHED.iterdir():
        assert path.stat().st_size < 2 * 2**20, path
        if path.suffix in (".json", ".ipynb", ".yaml"):
            assert not re.search(r"[\"' ]/(?:home|root|work|tmp|Users)/", path.read_text(encoding="utf-8")), path


def test_pages_that_stand_in_every_report_have_an_opening_a_place_and_results_under_the_same_claims():
    pages = {f"{of}_{name[:2]}" for of in params.STANDING for name in notebook_names(params.read(of))}
    assert all(params.read(of).pages for of in params.STANDING)  # a whole report stands in none
    book = PUBLISHED.parent
    assert {path.stem for path in book.glob("*_[0-9][0-9].md")} == pages
    assert set(re.findall(r"notebooks/(\w+_\d\d)\n", (book / "_toc.yml").read_text(encoding="utf-8"))) == pages
    for suffix in ("json", "ipynb"):
        assert {path.stem for path in PUBLISHED.glob(f"*_[0-9][0-9].{suffix}")} == pages
    claims = {json.loads(path.read_text(encoding="utf-8"))["claims"] for path in PUBLISHED.glob("day_*.json")}
    assert claims == {store.file_sha256(params.CLAIMS)}


def test_publishing_replaces_the_readme_block_only(tmp_path):
    source, readme = tmp_path / "run", tmp_path / "README.md"
    source.mkdir()
    for path in PUBLISHED.glob("[0-9]*"):
        (source / path.name).write_bytes(path.read_bytes())
    alone = [path for name in params.STANDING for path in PUBLISHED.glob(f"{name}_*")]
    files = {path.name: path for path in [*source.iterdir(), *PUBLISHED.glob("bench.*"), *alone]}
    readme.write_text(f"before\n{page._BEGIN}old\n{page._END}after\n", encoding="utf-8")
    page.publish(files, tmp_path / "book" / "published")
    page.write_readme(tmp_path / "book" / "published", readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert page.readme_headline(PUBLISHED) in text
    assert (tmp_path / "book" / "published" / "params.yaml").exists()
    made = json.loads((tmp_path / "book" / "published" / "headline.json").read_text(encoding="utf-8"))["tables"]
    of = [json.loads(path.read_text(encoding="utf-8"))["provenance"] for path in source.glob("*.json")]
    runs = dict(each for provenance in of for each in provenance["training_seconds"].items())
    measuring = sum({k: v for each in of for k, v in each["measuring_seconds"].items()}.values())
    values = json.loads((tmp_path / "book" / "published" / "headline.json").read_text(encoding="utf-8"))["values"]
    times = f"{len(runs)} runs took {sum(runs.values()) / 60:,.1f} minutes of one process to train"  # each once
    assert values["times"] == f"{times}, {measuring / 60:,.1f} to test, others beside it"
    page.write_headline(tmp_path / "book" / "published", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "headline.json").read_text(encoding="utf-8"))["tables"]
    assert again["answer"] == made["answer"] and again["data"] == made["data"]


API = (PUBLISHED.parent / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", weightsum_lib.__all__)
def test_every_public_name_is_on_the_library_page(name):
    assert len(re.findall(rf"^\.\. auto\w+:: weightsum_lib\.{name}(?:\(.*\))?$", API, re.MULTILINE)) == 1


def test_the_library_page_documents_what_is_there():
    for path in re.findall(r"^\.\. auto\w+:: ([\w.]+)", API, re.MULTILINE):
        found = pkgutil.resolve_name(path)
        assert found.__doc__.strip(), path
        if path.count(".") > 1 and not path.endswith("study.measure"):
            assert found.__module__ == path.rpartition(".")[0]


def test_a_curve_is_shown_with_a_line_a_row_and_a_share_a_column():
    index = pd.MultiIndex.from_tuples([("b", 1 / 8), ("b", 1 / 2), ("a", 1 / 8)], names=["line", "share"])
    shown = tables.by_share(pd.Series([interval([v]) for v in (97.0, 90.0, 50.0)], index))
    assert list(shown) == ["Networks", "k = 1/2", "k = 1/8"]
    assert shown.values.tolist() == [["b", "90.0", "97.0"], ["a", "–", "50.0"]]
