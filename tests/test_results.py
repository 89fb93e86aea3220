import json
import re
from pathlib import Path

import pytest

from weightsum_lib import plots, report, results

ROWS = [
    {"method": "independent", "seed": s, "before": 98.0 + s, "after": 12.0 + s, "support_before": 60.0}
    for s in range(3)
] + [{"method": "joint ce", "seed": s, "before": 98.0, "after": 97.0 + s / 2, "support_before": 56.0} for s in range(3)]


def test_interval_is_students_t():
    of = results.interval([97.0, 98.0, 99.0])
    assert of["mean"] == 98.0 and of["n"] == 3
    assert of["half"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert results.interval([5.0]) == {"mean": 5.0, "half": None, "n": 1}


def test_one_seed_shows_no_interval():
    assert results.format_interval(results.interval([97.24])) == "97.2"
    assert "±" in results.format_interval(results.interval([97.0, 98.0]))


def test_a_paired_difference_uses_the_seeds_that_both_have():
    of = results.paired_difference(ROWS[:2] + ROWS[3:], "independent", "joint ce", "before")
    assert of["mean"] == 0.5 and of["n"] == 2


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
    assert results.verdict(before, after) == words


def test_finding_turns_with_the_numbers():
    rows = results.with_gap(ROWS)
    a, b = results.summarize(rows, ["method"], ["before", "after", "gap", "kept"])
    text = results.finding(a, b, results.paired_difference(rows, "joint ce", "independent", "after"), True, "MNIST")
    assert "difference between the two sums: 84.5" in text and "already worse" not in text
    assert "the sum keeps the skill" in text and "their sum loses the skill" in text and "n = 3" in text
    assert "not told from zero" in text  # gaps 1.0, 0.5, 0.0
    worse = results.summarize([{**r, "after": 15.0, "gap": 83.0} for r in rows], ["method"], ["before", "after", "gap"])
    text = results.finding(worse[0], worse[1], results.interval([0.0]), False, "MNIST")
    assert "already worse before the sum" in text
    assert "the sum loses the skill" in text and "not told" not in text


def test_what_counts_is_within_the_margin_of_the_baseline():
    assert results.counts(ROWS, "joint ce", "independent", {"before": 1.0})
    assert not results.counts(ROWS, "joint ce", "independent", {"before": 0.5})
    assert not results.counts(ROWS, "joint ce", "independent", {"before": 1.0, "support_before": 3.0})


def test_summarize_leaves_out_what_a_row_lacks():
    rows = [{"method": "a", "x": 1.0}, {"method": "b"}]
    a, b = results.summarize(rows, ["method"], ["x"])
    assert a["x"]["mean"] == 1.0 and b["x"] is None
    assert results.table([a, b], {"method": "Method", "x": "X"}).values.tolist() == [["a", "1.0"], ["b", "–"]]


def test_an_aim_is_missed_by_more_than_the_interval_or_the_report_says_so():
    def row(*kept, **more):
        names = ("mnist", "svhn", "cifar10")
        return {
            "policy": "owner",
            "n": 2,
            **{f"kept_{n}": results.interval(k) for n, k in zip(names, kept, strict=False)},
            **more,
        }

    titles = {"mnist": "MNIST", "svhn": "SVHN"}
    sound, unsure, bad = [100.0, 100.0], [99.0, 99.8], [50.0, 51.0]
    text = results.finding_transfer(
        row(sound, unsure), row(sound, bad), [row(sound, bad, method="sparse")], row(*[sound] * 3),
        row(sound, bad, unsure),
        titles, {**titles, "cifar10": "CIFAR-10"},
    )  # fmt: skip
    assert "the aim of 99.5 % is missed on SVHN (inside its interval))" in text
    assert "the aim of 98 % is missed on SVHN)" in text and "the aim of 98 % is reached on all" in text
    assert "averaged over several: `sparse` 100.0\xa0±\xa00.0 % of MNIST, 50.5\xa0±\xa06.4 % of SVHN (n = 2)." in text


def test_the_price_is_what_a_twin_of_the_same_seed_can_do_more():
    def row(method, seed, before, policy="per_task"):
        return {"method": method, "seed": seed, "policy": policy, "before_mnist": before}

    rows = [row("full", 0, 99.0), row("small", 0, 97.5), row("keyed", 0, 96.0), row("keyed", 1, 90.0)]
    rows.append(row("keyed", 0, 0.0, "union"))
    same = {"full": "full", "small": "small", "keyed": "small"}
    priced = {(r["method"], r["seed"]): r for r in results.price(rows, same, "full", ["mnist"])}
    assert priced["keyed", 0]["gap_full_mnist"] == 3.0 and priced["keyed", 0]["gap_size_mnist"] == 1.5
    assert priced["keyed", 0]["before_mnist"] == 96.0
    assert ("keyed", 1) not in priced  # no twin has that seed
    assert priced["full", 0]["gap_full_mnist"] == 0.0


def test_a_page_says_which_data_it_was_made_from():
    images = {"train": 9000, "val": 1000, "test": 10}
    real = {"source": "real", "note": "exact", "images": images}
    text = results.data_notice({"mnist": real})
    assert "MNIST: real (9,000 training images; exact)" in text and "not numbers" not in text
    text = results.data_notice({"mnist": real, "svhn": {**real, "source": "stand-in"}})
    assert "SVHN: **synthetic stand-in**" in text and "not numbers of the real dataset" in text


def test_the_front_page_is_made_from_results_and_says_what_they_say(tmp_path):
    of = {"before": results.interval([98.0]), "after": results.interval([97.5]), "gap": results.interval([0.5]), "n": 1}
    rows = [{"method": "joint ce", **of}, {"method": "independent", **of, "after": results.interval([11.0])}]
    provenance = {
        "params": {
            "profile": "p", "arch": "vgg8", "width": 1.0, "train_images": 10, "epochs": 1, "epoch_images": 9,
            "seeds": 1, "methods": {"joint ce": {"protocol": "joint"}}, "parts": {},
        },
        "data": {
            "mnist": {"source": "real", "note": "exact", "checksum": "ab", "images": {"train": 9, "val": 1, "test": 5}}
        },
        "device": "CPU", "precision": "float32", "versions": {"torch": "2"}, "commit": "abc",
        "training_seconds": {"run": 60.0}, "measuring_seconds": 30.0,
    }  # fmt: skip
    content = {
        "headline": [results.headline_row(r, "Task 1: MNIST", "sum", results.interval([9.0])) for r in rows],
        "provenance": provenance,
    }
    report.write_headline(tmp_path, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "01_mnist_cifar10.json").write_text(json.dumps(content))
    report.write_headline(tmp_path, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "headline.json").read_text())
    assert made["tables"]["headline"]["rows"][0] == [
        "Task 1: MNIST",
        "sum, joint ce",
        "98.0",
        "97.5",
        "0.50",
        "9.0",
        "1",
    ]
    assert made["tables"]["answer"]["rows"] == [
        ["trained apart", "98.0 → 11.0", "loses the skill"],
        ["trained to be added", "98.0 → 97.5", "keeps the skill"],
    ]
    assert made["tables"]["times"]["rows"] == [["01_mnist_cifar10", "1", "1.0", "0.5"], ["all", "1", "1.0", "0.5"]]
    first = (tmp_path / "out" / "headline.png").read_bytes()
    report.write_headline(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "headline.png").read_bytes() == first


def test_figures_have_a_message_axes_with_units_and_n():
    plots.use_style()
    rows = results.summarize(ROWS, ["method"], ["before", "after"])
    figure = plots.before_after(rows, "the message", "MNIST")
    assert figure._suptitle.get_text() == "the message"
    label = figure.axes[0].get_xlabel()
    assert "accuracy (%)" in label and "n = 3 seeds, bars: 95 % interval" in label


PUBLISHED = Path(__file__).parent.parent / "book" / "published"


def test_the_readme_shows_the_published_numbers():
    readme = (PUBLISHED.parent.parent / "README.md").read_text(encoding="utf-8")
    assert report.readme_headline(PUBLISHED) in readme


def test_the_published_run_is_whole_and_names_its_data_and_commit():
    content = json.loads((PUBLISHED / "headline.json").read_text(encoding="utf-8"))
    assert content["provenance"]["commit"] not in ("", "unknown")
    for name, described in content["provenance"]["data"].items():
        assert described["source"] in ("real", "stand-in"), name
    for path in PUBLISHED.iterdir():
        assert path.stat().st_size < 2 * 2**20, path
        if path.suffix in (".json", ".ipynb", ".yaml"):
            assert not re.search(r"[\"' ]/(?:home|root|work|tmp|Users)/", path.read_text(encoding="utf-8")), path


def test_publishing_replaces_the_readme_block_only(tmp_path):
    source, readme = tmp_path / "run", tmp_path / "README.md"
    source.mkdir()
    for path in PUBLISHED.glob("[0-9]*"):
        (source / path.name).write_bytes(path.read_bytes())
    files = [*source.iterdir(), *PUBLISHED.glob("bench.*")]
    readme.write_text(f"before\n{report._BEGIN}old\n{report._END}after\n", encoding="utf-8")
    report.publish(files, source, tmp_path / "book" / "published", readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert report.readme_headline(PUBLISHED) in text
    assert (tmp_path / "book" / "published" / "params.yaml").exists()
    made = json.loads((tmp_path / "book" / "published" / "headline.json").read_text(encoding="utf-8"))["tables"]
    (line,) = made["profiles"]["rows"]  # one profile was run there: this one
    assert line[2:] == made["times"]["rows"][-1][1:] and float(line[3]) > 0
    report.write_headline(tmp_path / "book" / "published", tmp_path / "again")  # and the stored run keeps it
    again = json.loads((tmp_path / "again" / "headline.json").read_text(encoding="utf-8"))["tables"]
    assert again["profiles"] == made["profiles"]
