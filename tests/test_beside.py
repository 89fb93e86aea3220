"""The page beside others: the cases it is made of, and numbers of it by hand."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import tiny_params

from weightsum_lib.study import beside, measure
from weightsum_lib.study.params import ALONE, DISJOINT
from weightsum_lib.study.runs import Study
from weightsum_lib.study.train import logits_of

HALVES = ("mnist classes 0-4", "mnist classes 5-9")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    rows = dict.fromkeys((ALONE, "shared start, keyed size", DISJOINT))
    return Study(tiny_params(tmp_path_factory.mktemp("results"), merged=rows, halves=["mnist"], epochs=1))


@pytest.fixture(scope="module")
def frame(study):
    return beside.frame(study)


def cases(study, halved, row):
    """By way to sum or merge: the candidates of the first pair of networks, and of the last."""
    found = [each for each in beside._cases(study, halved, row, 0) if each[0].network != beside.ONE]
    return tuple({each[0].network: each for each in ordered} for ordered in (found[::-1], found))


def accuracy(frame, **levels):
    (row,) = frame[(frame[list(levels)] == list(levels.values())).all(axis=1)]["accuracy"]
    return row


def right(study, answers, tested="mnist"):
    dataset = study.dataset(tested)
    logits = sum(logits_of(network, dataset.test_images, "float32") for network in answers)
    return 100 * (logits.argmax(1) == dataset.test_labels).double().mean().item()


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    rows = dict.fromkeys((ALONE, DISJOINT))
    tiny = {"arch": "resnet20", "width": 1.0, "pages": ["05"], "rows": {}, "halves": ["mnist"], "epochs": 1}
    return Study(tiny_params(tmp_path_factory.mktemp("residual"), merged=rows, **tiny))


def test_each_network_learns_its_half_beside_the_other_halfs_images_or_another_dataset(study, residual):
    for of, arch in ((study, "vgg8"), (residual, "resnet20")):
        seen, unseen = cases(of, "mnist", DISJOINT)
        for each, supports in ((seen, HALVES[::-1]), (unseen, ("cifar10", "cifar10"))):
            for (case,) in each.values():
                assert [m.config.main for m in case.what.members] == list(HALVES) == [m.task for m in case.what.members]
                assert [m.config.support for m in case.what.members] == list(supports)
                assert {m.config.arch for m in case.what.members} == {arch}
                assert case.what.tasks == HALVES and case.tested == ("mnist", *HALVES)
        assert {case.method for each in (seen, unseen) for (case,) in each.values()} == {
            f"{DISJOINT}, seen",
            f"{DISJOINT}, unseen",
        }
        alone, _ = cases(of, "mnist", ALONE)
        assert not any(member.config.support for each in alone.values() for member in each[0].what.members)


def test_the_frame_has_every_way_of_each_row_on_all_classes_and_each_half(study, frame):
    ways = {beside.ONE, *beside._WAYS, *beside._FROM_A_START, "sum under random keys", "sum under disjoint keys"}
    assert set(frame["network"]) == ways
    counts = frame.groupby(["method", "network", "draw"], dropna=False)["tested"].nunique()
    assert set(counts.drop(beside.SIGNS, level="network")) == {3}
    of_keys = frame[frame["network"] == "sum under disjoint keys"]
    assert set(of_keys["method"]) == {f"{DISJOINT}, seen", f"{DISJOINT}, unseen"}
    assert set(of_keys["policy"]) == {"summed"}


def test_the_ensemble_and_the_sum_under_disjoint_keys_by_hand(study, frame):
    (unseen,) = cases(study, "mnist", DISJOINT)[1]["sum under disjoint keys"]
    networks = [study.run(member.config).networks["main"] for member in unseen.what.members]
    for tested in ("mnist", *HALVES):
        of_sum = accuracy(frame, method=f"{DISJOINT}, unseen", network="sum under disjoint keys", tested=tested)
        assert of_sum == right(study, networks, tested)  # as they were trained, statistics and all


def test_one_of_the_two_stands_there_alone_chosen_on_validation_images(study, frame):
    members = cases(study, "mnist", ALONE)[0][beside.ENSEMBLE][0].what.members
    (candidates,) = (each for each in beside._cases(study, "mnist", ALONE, 0) if each[0].network == beside.ONE)
    assert [case.what.members for case in candidates] == [(member,) for member in members]
    assert all(beside._chosen_on(case) == ("mnist",) for case in candidates)
    found = []
    for case in candidates:
        by_split = (measure.frame(study, [replace(case, split=split, tested=("mnist",))]) for split in ("val", "test"))
        found.append(tuple(accuracy(each, tested="mnist") for each in by_split))
    assert accuracy(frame, method=ALONE, network=beside.ONE, tested="mnist") == max(found, key=lambda each: each[0])[1]


def test_who_is_told_the_half_has_on_all_classes_the_mean_of_the_halves(frame):
    of_all, *halves = (accuracy(frame, method=ALONE, network=beside.SIGNS, tested=t) for t in ("mnist", *HALVES))
    assert of_all == pytest.approx(sum(halves) / 2)


@pytest.mark.parametrize("way", ["ZipIt!", "TIES"])
def test_validation_images_choose_the_coefficients(study, frame, way):
    candidates = cases(study, "mnist", ALONE if way == "ZipIt!" else "shared start, keyed size")[0][way]
    assert len(candidates) == len({c.what.coefficients for c in candidates}) == (3 if way == "ZipIt!" else 5)
    (chosen,), dataset = beside._chosen(study, [candidates]), study.dataset("mnist")
    found = {}
    for case in candidates:
        network = measure.under_policy(study, measure.made(study, case.what), "union", HALVES, "mnist")
        answers = logits_of(network, dataset.val_images, "float32").argmax(1)
        found[case.what.coefficients] = int((answers == dataset.val_labels).sum())
    assert found[chosen.what.coefficients] == max(found.values())
    tested = measure.frame(study, [chosen])
    of_all = accuracy(frame, method=chosen.method, network=way, tested="mnist")
    assert accuracy(tested, tested="mnist") == of_all
    told = frame[(frame["network"] == way) & (frame["method"] == chosen.method)]["chosen"]
    assert set(told) == {", ".join(f"{c:g}" for c in chosen.what.coefficients[way == "ZipIt!" :])}
    without = ["average", "sum, first ⅓ of the layers", beside.SIGNS, beside.ONE]
    assert set(frame[frame["network"].isin(without)]["chosen"]) == {""}


def test_what_gets_most_validation_images_right_on_the_mean_of_the_tasks_is_chosen(study, monkeypatch):
    found = {(0.2,): (90, 10), (0.3,): (60, 50), (0.5,): (70, 30)}
    sums = [beside.Sum((), ("mnist", "svhn"), coefficients=c) for c in found]
    candidates = [measure.Case("3", "a row", 0, "TIES", what, "union", ("mnist", "svhn")) for what in sums]

    def frame(study, cases):
        assert {case.split for case in cases} == {"val"}
        return pd.DataFrame({"accuracy": [n for case in cases for n in found[case.what.coefficients]]})

    monkeypatch.setattr(measure, "frame", frame)
    assert [c.what.coefficients for c in beside._chosen(study, [candidates, candidates[:1]])] == [(0.3,), (0.2,)]


def test_the_weights_of_what_is_merged_are_counted(frame):
    weights = frame[frame["method"] != "shared start, keyed size"].groupby("network")["weights"].mean()
    for way, wanted in {
        "average": 1,
        "sum": 1,
        "RegMean": 1,
        beside.ONE: 1,
        beside.ENSEMBLE: 2,
        "sum under disjoint keys": 2,
    }.items():
        assert weights[way] == pytest.approx(wanted, abs=0.02), way
    assert 1.5 < weights[beside.PART] < 2


def test_a_residual_network_is_zipped_too(residual):
    ((zipped, *_), (apart,)) = (cases(residual, "mnist", ALONE)[0][way] for way in ("ZipIt!", beside.ENSEMBLE))
    made, member = measure.made(residual, zipped.what), residual.run(zipped.what.members[0].config).networks["main"]
    assert [p.shape for p in made.parameters()] == [p.shape for p in member.parameters()]
    of_all = accuracy(measure.frame(residual, [apart]), tested="mnist")
    networks = measure.made(residual, apart.what).networks
    assert isinstance(networks, torch.nn.ModuleList) and of_all == right(residual, networks)
