"""What is measured, held to sums made by hand."""

import copy

import pandas as pd
import pytest
import torch
from conftest import tiny_params

from weightsum_lib import Ensemble, WeightSum, compact, normalize, recalibrate, relabelled
from weightsum_lib.study import measure, store, sums
from weightsum_lib.study.config import build
from weightsum_lib.study.runs import Study
from weightsum_lib.study.train import autocast, percent_right


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny study whose networks are trained once for all tests here."""
    return Study(tiny_params(tmp_path_factory.mktemp("study"), plane_points=7))


@pytest.fixture(scope="module")
def pairs(study):
    return measure.pairs(study, "mnist", "cifar10")


@pytest.fixture(scope="module")
def strangers(study):
    return measure.strangers(study, "mnist", "svhn")


def one(frame: pd.DataFrame, **wanted) -> float:
    """The accuracy of the one row that has these values."""
    rows = frame.loc[(frame[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    assert len(rows) == 1, (wanted, len(rows))
    return rows["accuracy"].item()


def percent(study, network, name, images=None, split="test"):
    """Percent of a task that a copy gets right, statistics from these images or its own."""
    network = network.materialize() if isinstance(network, WeightSum) else network
    network = copy.deepcopy(network)
    d = study.dataset(name)
    if images is not None:
        with autocast(study.precision, images.device):
            recalibrate(network, normalize(images))
    return percent_right(network.eval(), getattr(d, f"{split}_images"), getattr(d, f"{split}_labels"), study.precision)


def network(study, method, main, support="cifar10", role="main"):
    members = measure.pair_members(study, method, main, support, 0)
    return study.run(members[0].config).networks[role]


def calibration(study, *names):
    return sums.calibration_images(study, names)


def test_before_and_after_are_what_a_hand_made_sum_measures(study, pairs):
    main, support = (network(study, "joint ce", "mnist", role=role) for role in ("main", "support"))
    mnist = calibration(study, "mnist")
    about = {"method": "joint ce", "policy": "per_task"}
    total = percent(study, WeightSum([main, support]), "mnist", mnist)
    assert one(pairs, **about, network="sum", tested="mnist") == total
    assert one(pairs, **about, network="main", tested="mnist") == percent(study, main, "mnist", mnist)
    assert one(pairs, **about, network="support", tested="mnist") == percent(study, support, "mnist", mnist)
    own = percent(study, support, "cifar10", calibration(study, "cifar10"))
    assert one(pairs, **about, network="support", tested="cifar10") == own
    batch = one(pairs, method="joint ce", policy="summed", network="sum", tested="mnist")
    assert batch == percent(study, WeightSum([main, support]).add_statistics(), "mnist")


def test_every_row_of_the_profile_is_measured_under_every_policy_that_fits_it(study, pairs, strangers):
    sequential = [f"sequential, from {start}" for start in ("the sum", "θ_main", "random weights")]
    wanted = [m for row in study.params.rows for m in (sequential if row == "sequential" else [row])]
    assert list(dict.fromkeys(pairs["method"])) == wanted
    before = [one(pairs, method=m, network="main", tested="mnist", policy="per_task") for m in sequential]
    alone = one(pairs, method="independent", network="main", tested="mnist", policy="per_task")
    assert before == [alone] * 3
    for frame, rows in ((pairs, wanted[3:]), (strangers, [r for r in study.params.rows if r != "sequential"])):
        for row in set(rows) - set(sequential):
            keys = study.params.method(row).keys
            has = [p for p in measure.POLICIES if p != "owner" or keys == "disjoint"]
            assert list(dict.fromkeys(frame[frame["method"] == row]["policy"])) == has


def test_a_measurement_is_made_once(study, pairs, monkeypatch):
    monkeypatch.setattr(measure, "logits_of", lambda *a: pytest.fail("measured again"))
    again = measure.pairs(Study(study.params), "mnist", "cifar10")
    pd.testing.assert_frame_equal(again, pairs)
    monkeypatch.setattr(store, "code_digest", lambda *roots: "edited since")
    with pytest.raises(pytest.fail.Exception):
        measure.frame(study, [case for case in measure._strangers(study, "mnist", "svhn", False)][:1])


def test_sums_of_strangers_and_their_controls(study, strangers):
    theta_m, theta_s = (network(study, "joint ce", name) for name in ("mnist", "svhn"))
    both = calibration(study, "mnist", "svhn")
    about = {"method": "joint ce", "policy": "union"}
    total = WeightSum([theta_m, theta_s])
    assert one(strangers, **about, network="sum", tested="svhn") == percent(study, total, "svhn", both)
    assert one(strangers, **about, network="svhn", tested="mnist") == percent(study, theta_s, "mnist", both)
    ensemble = percent(study, Ensemble([theta_m, theta_s]), "svhn", both)
    assert one(strangers, **about, network="ensemble", tested="svhn") == ensemble
    renaming = torch.arange(10).roll(1)
    renamed = percent(study, WeightSum([theta_m, relabelled(theta_s, renaming)]), "svhn renamed 1", both)
    assert one(strangers, **about, network="renamed", tested="svhn") == renamed
    assert strangers["confidence"].between(10, 100.001).all()


def test_under_disjoint_keys_the_state_dicts_are_added(study, strangers):
    theta_m, theta_s = (network(study, "disjoint keys", name) for name in ("mnist", "svhn"))
    about = {"method": "disjoint keys", "policy": "owner"}
    ensemble = percent(study, Ensemble([theta_m, theta_s]), "svhn")
    assert one(strangers, **about, network="ensemble", tested="svhn") == ensemble
    of_sum = one(strangers, **about, network="sum", tested="svhn")
    assert of_sum == pytest.approx(ensemble, abs=2.6)  # one image of 40: bfloat16


def test_a_policy_gives_the_statistics_that_it_names(study):
    theta = network(study, "joint ce", "mnist")
    both = ("mnist", "svhn")
    means = {p: sums.under_policy(study, theta, p, both, "mnist").features.bn1_1.running_mean for p in measure.POLICIES}
    assert torch.equal(means["owner"], theta.features.bn1_1.running_mean) and means["batch"] is None
    assert not torch.allclose(means["union"], means["per_task"])
    batch = sums.under_policy(study, theta, "batch", both, "mnist")
    x = normalize(study.dataset("mnist").test_images)
    assert not torch.allclose(batch(x[:20]), batch(x)[:20]) and not batch.training


def test_a_key_is_a_property_of_the_sum_and_not_of_the_run(study):
    members = measure.stranger_members(study, "random keys", ("mnist", "svhn"), 0)
    first = sums.keyed(study, "random keys", members, ("mnist", "svhn"))
    wider = sums.Sum(first.members, first.tasks, keys="random", width=first.width * 4)
    sizes = [s.key_of(0).sizes["classifier.fc2"] for s in (first, wider)]
    assert sizes[1] == 4 * sizes[0]
    drawn = [sums.Sum(first.members, first.tasks, keys="random", width=first.width, draw=d) for d in (0, 0, 1)]
    at = [d.key_of(1).positions["classifier.fc2"].tolist() for d in drawn]
    assert at[0] == at[1] != at[2]
    dealt = sums.Sum(first.members, first.tasks, keys="disjoint", width=first.width)
    assert not torch.isin(*(dealt.key_of(i).positions["classifier.fc1"] for i in (0, 1))).any()


def test_redrawn_keys_move_the_networks_and_change_nothing_else(study, strangers):
    frame = measure.draws(study, "random keys", "mnist", "svhn")
    about = {"method": "random keys", "network": "sum", "tested": "svhn"}
    assert one(frame, **about, draw=0) == one(strangers, **about, policy="union")
    of_sum = frame[(frame["network"] == "sum") & (frame["tested"] == "mnist")]
    assert of_sum["draw"].tolist() == list(range(measure.DRAWS)) and of_sum["accuracy"].nunique() > 1
    keys = [sums.keyed(study, "random keys", measure.stranger_members(study, "random keys", ("mnist", "svhn"), 0),
                          ("mnist", "svhn"), draw=3).key_of(i) for i in (0, 1)]  # fmt: skip
    networks = [network(study, "random keys", name) for name in ("mnist", "svhn")]
    by_hand = WeightSum(networks, keys=compact(keys))
    assert one(frame, **about, draw=3) == percent(study, by_hand, "svhn", calibration(study, "mnist", "svhn"))


def test_in_a_disjoint_sum_each_network_explains_all_of_its_own_channels(study):
    rows = measure.explained(study, "disjoint keys", "mnist", "svhn").set_index("layer")
    assert rows["explained"].drop("fc3").tolist() == pytest.approx([1] * (len(rows) - 1), abs=1e-6)
    assert rows.loc["fc3", "explained"] < 1
    assert rows.loc["fc1", "overlap"] == 0 and rows.loc["fc3", "overlap"] == 1
    dense = measure.explained(study, "independent", "mnist", "svhn")
    assert dense["explained"].max() < 0.9 and set(dense["overlap"]) == {1.0}


def test_more_than_two_networks_and_who_met_whom(study):
    three = [("mnist", "cifar10", "main"), ("svhn", "cifar10", "main"), ("cifar10", "mnist inverted", "main")]
    frame = measure.several(study, "disjoint keys", three, 0)
    networks = [network(study, "disjoint keys", task, partner) for task, partner, _ in three]
    members = [m for task, p, _ in three for m in measure.pair_members(study, "disjoint keys", task, p, 0)[:1]]
    what = sums.keyed(study, "disjoint keys", members, [t for t, *_ in three])
    total = WeightSum(networks, keys=[what.key_of(i) for i in range(3)]).add_statistics()
    found = one(frame, network="sum", tested="svhn")
    assert found == pytest.approx(percent(study, total, "svhn"), abs=2.6)
    assert one(frame, network="svhn", tested="svhn") == percent(study, networks[1], "svhn")
    met = measure.several(study, "random keys", [*three[:2], ("cifar10", "mnist", "support")], 0)
    pair = network(study, "random keys", "mnist", role="support")
    images = calibration(study, "mnist", "svhn", "cifar10")
    assert one(met, network="cifar10", tested="cifar10") == percent(study, pair, "cifar10", images)


def test_other_mergers_and_ceilings_have_a_row_each(study, strangers):
    frame = measure.mergers(study, "mnist", "svhn")
    assert set(frame["method"]) == {
        "sum", "average", "Git Re-Basin, then average", "RegMean", "ensemble of logits",
        "sum with random weights of the partner's norms", "task arithmetic from a shared start, × 0.5",
        "task arithmetic from a shared start, × 1",
    }  # fmt: skip
    assert (frame.groupby("method")["tested"].apply(sorted).map(tuple) == ("mnist", "svhn")).all()
    same = {"method": "independent", "policy": "union", "tested": "mnist"}
    assert one(frame, method="sum", tested="mnist") == one(strangers, **same, network="sum")
    assert one(frame, method="ensemble of logits", tested="mnist") == one(strangers, **same, network="ensemble")
    start = build(study.config("shared start", "mnist"))
    a, b = (study.run(study.config("shared start", name)).networks["main"] for name in ("mnist", "svhn"))
    half = WeightSum([start, a, b], [0, 0.5, 0.5])
    scaled = one(frame, method="task arithmetic from a shared start, × 0.5", tested="svhn")
    assert scaled == percent(study, half, "svhn", calibration(study, "mnist", "svhn"))
    ceilings = measure.ceilings(study, "mnist", "svhn")
    assert len(ceilings) == 2 * 2 * study.params.ceiling_seeds


def test_a_network_trained_alone_does_not_know_its_key(study):
    config = study.config("keys alone", "mnist")
    assert config.method.keys == "none" and config.method.network_width == 0.25
    members = measure.pair_members(study, "keys alone", "mnist", "cifar10", 0)
    key = sums.keyed(study, "keys alone", members, ("mnist", "cifar10")).key_of(0)
    theta = study.run(config).networks["main"]
    assert key.sizes["classifier.fc1"] == 4 * len(theta.classifier.fc1.weight)


def test_the_plane_holds_the_sum_and_the_networks_alone(study):
    plane = measure.plane(study, "joint ce", "mnist", "svhn", strangers=True)
    zero, unit = plane["coefficients"].index(0.0), plane["coefficients"].index(1.0)
    theta = network(study, "joint ce", "mnist")
    images = calibration(study, "mnist")
    assert plane["mnist"][unit][zero] == percent(study, theta, "mnist", images, "val")
    both = WeightSum([theta, network(study, "joint ce", "svhn")])
    assert plane["mnist"][unit][unit] == percent(study, both, "mnist", images, "val")


def test_layers_and_histories_are_those_of_the_pairs(study, pairs):
    layers = measure.layers(study, "mnist", "cifar10")
    assert set(layers["method"]) == set(study.params.rows) - {"sequential"}
    a, b = (network(study, "joint ce", "mnist", role=role) for role in ("main", "support"))
    row = layers[(layers["method"] == "joint ce") & (layers["layer"] == "fc2")].iloc[0]
    wanted = a.classifier.fc2.weight.norm() / b.classifier.fc2.weight.norm()
    assert row["norm_ratio"] == pytest.approx(wanted.item())
    histories = measure.histories(study, "mnist", "cifar10")
    assert list(histories) == [m for m in study.params.rows if study.params.method(m).protocol == "joint"]
    assert [row["epoch"] for row in histories["joint ce"]] == [1, 2]
