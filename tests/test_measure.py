"""What is measured, held to sums made by hand."""

import base64
import copy
import shutil
from dataclasses import replace

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_params

from weightsum_lib import Ensemble, WeightSum, compact, normalize, overlap, recalibrate, relabelled
from weightsum_lib.report import tables
from weightsum_lib.study import beside, measure, params, plan, store, sums
from weightsum_lib.study.config import build
from weightsum_lib.study.runs import Study
from weightsum_lib.study.train import autocast, percent_right


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny study whose networks are trained once for all tests here."""
    return Study(tiny_params(tmp_path_factory.mktemp("study"), plane_points=7, ceiling_seeds=1))


@pytest.fixture(scope="module")
def pairs(study):
    return measure.frame(study, measure.pairs(study, "mnist", "cifar10"))


@pytest.fixture(scope="module")
def strangers(study):
    return measure.frame(study, measure.strangers(study, "mnist", "svhn"))


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


def test_a_measurement_is_kept_under_all_that_it_depends_on(study, monkeypatch):
    pair = measure.members(study, "random keys", ["mnist", "svhn"], 0)
    total = sums.keyed(study, "random keys", pair, 1 / 4, narrow=8)
    case = {"policy": "union", "tested": ("mnist", "svhn"), "split": "test"}

    def key():
        return store.content_key(study.content_of(measure.measurement(study, measure.accuracies, total, **case)))

    def forget():
        store.reached.cache_clear(), store._parsed.cache_clear()

    keys, sources = [key()], dict(store._SOURCES)
    for old, new in (
        ("def key_of(self, index: int)", "def key_of(self, index: int = 0)"),
        ("self.narrow", "(self.narrow + 1)"),
    ):
        assert old in sources["study.sums"]
        monkeypatch.setitem(store._SOURCES, "study.sums", sources["study.sums"].replace(old, new))
        forget()
        keys.append(key())
    monkeypatch.setitem(store._SOURCES, "study.sums", sources["study.sums"])
    forget()
    svhn = study.dataset("svhn")
    for change in ({"test_images": svhn.test_images.flip(0)}, {"test_labels": svhn.test_labels.flip(0)}):
        monkeypatch.setitem(study._datasets, "svhn", replace(svhn, **change))
        keys.append(key())
    monkeypatch.setitem(study._datasets, "svhn", replace(svhn, note="since TimeoutError"))
    assert len(set(keys)) == 5 and key() == keys[0]


def test_each_owner_has_the_images_that_there_are(study, monkeypatch):
    svhn, seen = study.dataset("svhn"), []
    total = sums.keyed(study, "random keys", measure.members(study, "random keys", ["mnist", "svhn"], 0), 1 / 4)
    network = sums.made(study, total)
    monkeypatch.setitem(study._datasets, "svhn", replace(svhn, train_images=svhn.train_images[:5]))
    monkeypatch.setattr(sums, "recalibrate", lambda network, images, owners: seen.append((len(images), owners)))
    sums.under_policy(study, network, "by_owner", total.tasks, "")
    ((images, owners),) = seen
    assert images == study.params.calibration_images + 5 == len(owners)
    assert owners.bincount().tolist() == [images - 5, 5]


def test_before_and_after_are_what_a_hand_made_sum_measures(study, pairs):
    main, support = (network(study, "joint ce", "mnist", role=role) for role in ("main", "support"))
    mnist = calibration(study, "mnist")
    about = {"method": "joint ce"}
    total = percent(study, WeightSum([main, support]), "mnist", mnist)
    assert one(pairs, **about, policy="per_task", network="sum", tested="mnist") == total
    alone = {"network": "mnist", "tested": "mnist"}
    assert one(pairs, **about, policy="own", **alone) == percent(study, main, "mnist", mnist)
    photos = calibration(study, "cifar10")
    for name in ("mnist", "cifar10"):  # under its own statistics on either
        about_support = {**about, "policy": "own", "network": "cifar10"}
        assert one(pairs, **about_support, tested=name) == percent(study, support, name, photos)
    batch = one(pairs, method="joint ce", policy="summed", network="sum", tested="mnist")
    assert batch == percent(study, WeightSum([main, support]).add_statistics(), "mnist")


def test_every_row_of_the_profile_is_measured_under_every_policy_that_fits_it(study, pairs, strangers):
    sequential = [f"sequential, from {start}" for start in ("the sum", "θ_main", "random weights")]
    wanted = [m for row in study.params.rows for m in (sequential if row == "sequential" else [row])]
    assert list(dict.fromkeys(pairs["method"])) == wanted
    of_main = {"network": "mnist", "tested": "mnist", "policy": "own"}
    before = [one(pairs, method=m, **of_main) for m in sequential]
    assert before == [one(pairs, method="independent", **of_main)] * 3
    for frame, rows in ((pairs, wanted[3:]), (strangers, [r for r in study.params.rows if r != "sequential"])):
        for row in set(rows) - set(sequential):
            keys = study.params.method(row).keys
            has = [p for p in measure.POLICIES if p != "by_owner" or keys != "none"]
            of_sums = frame[(frame["method"] == row) & (frame["network"] == "sum")]
            assert list(dict.fromkeys(of_sums["policy"])) == has


def test_a_measurement_is_made_once(study, pairs, monkeypatch):
    monkeypatch.setattr(measure, "logits_of", lambda *a: pytest.fail("measured again"))
    again = measure.frame(other := Study(study.params), measure.pairs(other, "mnist", "cifar10"))
    pd.testing.assert_frame_equal(again, pairs)
    monkeypatch.setattr(store, "code_digest", lambda *roots: "edited since")
    with pytest.raises(pytest.fail.Exception):
        measure.frame(study, [*measure.strangers(study, "mnist", "svhn")][:1])


def test_which_images_were_right_is_kept_and_tells_the_sampling_error(study):
    member = measure.pair_members(study, "joint ce", "mnist", "cifar10", 0)[0]
    found = measure.accuracies(study, sums.alone(member), "own", ("mnist",), "test")["mnist"]
    right = np.unpackbits(np.frombuffer(base64.b64decode(found["right"]), np.uint8))[: found["images"]]
    assert found["images"] == 40 and 100 * right.mean() == found["accuracy"]
    blocks = right.reshape(4, 10).mean(1)
    assert measure.sampling_error(found["right"], 40) == pytest.approx(100 * blocks.std(ddof=1) / 2)
    bits = np.random.default_rng(0).random(4000) < 0.9
    packed = base64.b64encode(np.packbits(bits)).decode()
    assert measure.sampling_error(packed, 4000) == pytest.approx(100 * (0.09 / 4000) ** 0.5, rel=0.15)


def test_sums_of_strangers_and_their_controls(study, strangers):
    theta_m, theta_s = (network(study, "joint ce", name) for name in ("mnist", "svhn"))
    both, own = calibration(study, "mnist", "svhn"), [calibration(study, name) for name in ("mnist", "svhn")]
    total, about = WeightSum([theta_m, theta_s]), {"method": "joint ce"}
    assert one(strangers, **about, policy="union", network="sum", tested="svhn") == percent(study, total, "svhn", both)
    alone = one(strangers, **about, policy="own", network="svhn", tested="mnist")
    assert alone == percent(study, theta_s, "mnist", own[1])
    with autocast(study.precision, both.device):
        parents = [recalibrate(copy.deepcopy(t), normalize(x)) for t, x in zip((theta_m, theta_s), own, strict=True)]
    ensemble = percent(study, Ensemble(parents), "svhn")
    assert one(strangers, **about, policy="own", network="ensemble", tested="svhn") == ensemble
    renaming = torch.arange(10).roll(1)
    renamed = percent(
        study, WeightSum([theta_m, relabelled(theta_s, renaming, torch.ones(2, 3, 32, 32))]), "svhn renamed 1", both
    )
    assert one(strangers, **about, network="renamed", tested="svhn") == renamed
    assert strangers["confidence"].between(10, 100.001).all() and set(strangers["split"]) == {"test"}


def test_under_disjoint_keys_the_state_dicts_are_added(study, strangers):
    networks = [network(study, "disjoint keys", name) for name in ("mnist", "svhn")]
    of_sum = one(strangers, method="disjoint keys", policy="summed", network="sum", tested="svhn")
    by_hand = percent(study, Ensemble(networks), "svhn")
    assert of_sum == pytest.approx(by_hand, abs=2.6)  # one image of 40: bfloat16
    # and compared with what they are themselves as they were trained
    about = {"method": "disjoint keys", "policy": "summed", "tested": "svhn"}
    assert one(strangers, **about, network="ensemble") == by_hand
    before = one(strangers, **about, network="svhn")
    assert before == percent(study, networks[1], "svhn")
    rows = tables.wide(strangers).xs(("disjoint keys", "svhn"), level=("method", "tested"))
    assert rows.xs("summed", level="policy")["before"].tolist() == [before]
    re_estimated = one(strangers, method="disjoint keys", policy="own", network="svhn", tested="svhn")
    assert rows.xs("union", level="policy")["before"].tolist() == [re_estimated]


def test_a_scale_written_as_its_deviation_from_1_changes_no_network_but_the_sum(study):
    members, x = (
        measure.members(study, "keys alone", ["mnist", "svhn"], 0),
        normalize(study.dataset("mnist").test_images),
    )

    def function(what, how):
        total = sums.made(study, replace(what, how=how))
        return [sums.under_policy(study, n, "union", what.tasks, "")(x) for n in (total.networks[1], total)]

    dense = sums.keyed(study, "keys alone", members, 1 / 2)
    (alone, total), (same, other) = function(dense, "plain"), function(dense, "centered")
    torch.testing.assert_close(same, alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(other, total, rtol=1e-2, atol=1e-2)
    total, keys = sums.made(study, replace(dense, how="centered")), compact([dense.key_of(0), dense.key_of(1)])
    scale = torch.ones(keys[0].sizes["features.conv2_1"])
    for key, member in zip(keys, members, strict=True):
        scale[key.positions["features.conv2_1"]] += study.run(member.config).networks["main"].features.bn2_1.weight - 1
    torch.testing.assert_close(1 + total.materialize().features.bn2_1.weight, scale)
    recipe = sums.keyed(study, "random keys", measure.members(study, "random keys", ["mnist", "svhn"], 0), 1 / 8)
    assert torch.equal(function(recipe, "centered")[1], function(recipe, "plain")[1])  # is written so already


def test_who_is_told_the_task_has_biases_and_batch_norm_of_its_own(study):
    pair = tuple(measure.members(study, "independent", ["mnist", "svhn"], 0))
    network, alone = (
        sums.made(study, sums.Sum(pair, ("mnist", "svhn"), "signed")).materialize(),
        study.run(pair[0].config),
    )
    for name, vector in alone.networks["main"].named_parameters():
        assert torch.equal(network.get_parameter(name), vector) == (vector.ndim == 1), name


def test_a_policy_gives_the_statistics_that_it_names(study):
    total, both = WeightSum([network(study, "joint ce", name) for name in ("mnist", "svhn")]), ("mnist", "svhn")
    means = {p: sums.under_policy(study, total, p, both, "mnist").features.bn1_1.running_mean for p in measure.POLICIES}
    parents = [n.features.bn1_1.running_mean for n in total.networks]
    torch.testing.assert_close(means["summed"], parents[0] + parents[1])
    torch.testing.assert_close(means["by_owner"], means["union"])
    assert not torch.allclose(means["union"], means["per_task"]) and means["batch"] is None
    batch = sums.under_policy(study, total, "batch", both, "mnist")
    x = normalize(study.dataset("mnist").test_images)
    assert not torch.allclose(batch(x[:20]), batch(x)[:20]) and not batch.training


def test_a_key_is_a_property_of_the_sum_and_not_of_the_run(study):
    members = measure.members(study, "random keys", ("mnist", "svhn"), 0)
    trained = sums.keyed(study, "random keys", members)
    wider = sums.keyed(study, "random keys", members, trained.share / 4)
    sizes = [s.key_of(0).sizes["classifier.fc2"] for s in (trained, wider)]
    assert sizes[1] == 4 * sizes[0] and wider.share == trained.share / 4
    at = [replace(trained, draw=d).key_of(1).positions["classifier.fc2"].tolist() for d in (0, 0, 1)]
    assert at[0] == at[1] != at[2]
    dealt = replace(trained, keys="disjoint")
    assert not torch.isin(*(dealt.key_of(i).positions["classifier.fc1"] for i in (0, 1))).any()


def test_narrow_layers_get_the_room_of_wider_ones(study):
    members = measure.members(study, "random keys", ("mnist", "svhn"), 0)
    key = sums.keyed(study, "random keys", members, 1 / 8, narrow=16).key_of(0)
    for group, size in key.channels.sizes.items():
        assert key.sizes[group] == 8 * max(size, 16), group
    rows = measure.room(study, "random keys", ("mnist", "svhn"), [1 / 8]).set_index("layer")
    assert rows.loc["features.conv1_1", "shared"] == 1 / (8 * 64) and (rows["room"] >= 8 * 64).all()


def test_keys_that_are_random_in_one_layer_are_disjoint_in_all_others(study):
    members = measure.members(study, "random keys", ("mnist", "svhn"), 0)
    what = sums.keyed(study, "random keys", members, 1 / 2, only="classifier.fc1")
    keys, drawn = ([w.key_of(i) for i in (0, 1)] for w in (what, replace(what, only="")))
    shared = overlap(*keys)
    assert {group for group, share in shared.items() if share} == {"classifier.fc1"}
    assert shared["classifier.fc1"] == overlap(*drawn)["classifier.fc1"]


def test_redrawn_keys_move_the_networks_and_change_nothing_else(study, strangers):
    about = {"method": "random keys", "network": "sum", "policy": "by_owner"}
    of_sum = strangers[(strangers[list(about)] == pd.Series(about)).all(axis=1) & (strangers["tested"] == "mnist")]
    assert of_sum["draw"].tolist() == list(range(study.params.draws)) and of_sum["confidence"].nunique() > 1
    renamed = strangers[(strangers["method"] == "random keys") & (strangers["network"] == "renamed")]
    assert renamed["draw"].tolist() == [draw for draw in range(study.params.draws) for _ in ("mnist", "svhn")]
    members = measure.members(study, "random keys", ("mnist", "svhn"), 0)
    what = sums.keyed(study, "random keys", members, measure.SHARE, narrow=measure.NARROW, draw=1)
    keys, networks = [what.key_of(i) for i in (0, 1)], [network(study, "random keys", n) for n in ("mnist", "svhn")]
    by_hand = WeightSum(networks, keys=compact(keys))
    images = calibration(study, "mnist", "svhn")
    with autocast(study.precision, images.device):
        recalibrate(by_hand, normalize(images), torch.arange(2).repeat_interleave(len(images) // 2))
    assert one(strangers, **about, tested="svhn", draw=1) == percent(study, by_hand, "svhn")


def test_a_curve_has_every_share_draw_and_policy(study):
    rows, about = ["random keys", "keys alone"], {"draws": 2, "split": "val"}
    curves = [
        measure.curve(study, rows, ("mnist", "svhn"), (1 / 2, 1 / 32), policy=policy, narrow=narrow, **about)
        for policy in ("", "summed")
        for narrow in (0, 16)
    ]
    frame = pd.concat(curves).drop_duplicates()
    of_sum = frame[frame["network"] == "sum"]
    levels = ["method", "share", "narrow", "policy", "draw", "tested"]
    assert len(of_sum) == 2**6 and not of_sum.duplicated(levels).any()
    assert set(of_sum["split"]) == {"val"} and set(of_sum["share"]) == {1 / 2, 1 / 32}
    assert set(frame["network"]) == {"sum", "mnist", "svhn", "ensemble"}


def test_in_a_disjoint_sum_each_network_explains_all_of_its_own_channels(study):
    rows = measure.explained(study, "disjoint keys", "mnist", "svhn").set_index("layer")
    assert rows["explained"].drop("fc3").tolist() == pytest.approx([1] * (len(rows) - 1), abs=1e-6)
    assert rows.loc["fc3", "explained"] < 1
    dense = measure.explained(study, "independent", "mnist", "svhn")
    assert dense["explained"].max() < 0.9


def test_more_than_two_networks_and_who_met_whom(study):
    three = [("mnist", "cifar10", "main"), ("svhn", "cifar10", "main"), ("cifar10", "mnist inverted", "main")]
    frame = measure.curve(study, ["disjoint keys"], three, seeds=lambda method: [0])
    networks = [network(study, "disjoint keys", task, partner) for task, partner, _ in three]
    members = [m for task, p, _ in three for m in measure.pair_members(study, "disjoint keys", task, p, 0)[:1]]
    what = sums.keyed(study, "disjoint keys", members)
    total = WeightSum(networks, keys=[what.key_of(i) for i in range(3)]).add_statistics()
    found = one(frame, network="sum", tested="svhn")
    assert found == pytest.approx(percent(study, total, "svhn"), abs=2.6)
    assert one(frame, network="svhn", tested="svhn") == percent(study, networks[1], "svhn")
    met = measure.curve(study, ["random keys"], [*three[:2], ("cifar10", "mnist", "support")], seeds=lambda method: [0])
    pair = network(study, "random keys", "mnist", role="support")
    alone = percent(study, pair, "cifar10", calibration(study, "cifar10"))
    assert one(met, network="cifar10", tested="cifar10") == alone
    assert (met["network"] == "sum").sum() == 3 * study.params.draws


def test_the_channels_that_networks_share_in_a_sum_are_counted(study):
    members = measure.members(study, "random keys", ("mnist", "svhn"), 0)
    what = sums.keyed(study, "random keys", members, 1 / 4)
    both, sizes = overlap(*compact([what.key_of(0), what.key_of(1)])), what.key_of(0).sizes
    assert what.shared() == {n: pytest.approx(sum(both.values()) / len(sizes)) for n in ("mnist", "svhn")}
    assert 0 < what.shared()["mnist"] < 1 and sums.keyed(study, "disjoint keys", members).shared() == {}
    # of three networks a channel may be shared with either
    third = measure.members(study, "random keys", [("cifar10", "mnist inverted", "main")], 0)
    assert sums.keyed(study, "random keys", members + third, 1 / 4).shared()["mnist"] > what.shared()["mnist"]


def test_disjoint_keys_make_room_for_every_network(study):
    networks = measure.members(study, "disjoint keys", ["mnist", "svhn"] * 4, 0)
    keys = [what.key_of(i) for what in [sums.keyed(study, "disjoint keys", networks)] for i in range(8)]
    assert not any(share for i in range(8) for share in overlap(*compact([keys[i], keys[i - 1]])).values())
    few, m = sums.keyed(study, "disjoint keys", networks[:2]), study.params.method("disjoint keys")
    assert few.width == study.params.width * m.sum_width


def test_the_worth_of_a_standin_is_that_of_a_network_which_saw_no_other_image(study):
    rows = measure.frame(study, measure.standin_worth(study, ["svhn"])).set_index(["policy", "tested"])["accuracy"]
    # here the dataset is its own stand-in
    assert rows["own", "svhn"] == rows["own", "svhn stand-in"] == rows["per_task", "svhn"]
    made = study.dataset("svhn stand-in")
    assert made.source == "stand-in" and made.name == "svhn stand-in"
    assert study.run(study.config("keys alone", "svhn stand-in")).networks


@pytest.mark.no_cover
def test_other_mergers_and_ceilings_have_a_row_each(study, strangers):
    frame = beside.mergers(study, "mnist", "svhn")
    ways = {"independent": {*beside._WAYS, "sum with random weights of the partner's norms"}}
    ways |= {"shared start": set(beside._FROM_A_START), "random keys": set(beside._WAYS)}
    assert {row: set(of["method"]) for row, of in frame.groupby("task")} == ways
    assert (frame.groupby(["task", "method"])["tested"].apply(sorted).map(tuple) == ("mnist", "svhn")).all()
    for row in ("independent", "random keys"):
        same = {"method": row, "tested": "mnist", "network": "ensemble", "policy": "own"}
        assert one(frame, task=row, method="ensemble of logits", tested="mnist") == one(strangers, **same)
    same = {"task": "independent", "method": "sum", "tested": "mnist"}
    assert one(frame, **same) == one(strangers, method="independent", tested="mnist", policy="union", network="sum")
    start = build(study.config("shared start", "mnist"))
    a, b = (study.run(study.config("shared start", name)).networks["main"] for name in ("mnist", "svhn"))
    images = calibration(study, "mnist", "svhn")

    def scaled(scale, split):
        network = WeightSum([start, a, b], [1 - 2 * scale, scale, scale])
        return [percent(study, network, name, images, split) for name in ("mnist", "svhn")]

    best = max((0.3, 0.5, 0.7, 1.0), key=lambda scale: sum(scaled(scale, "val")))  # the first of equal ones, as there
    found = [one(frame, method="task arithmetic", tested=name) for name in ("mnist", "svhn")]
    assert found == scaled(best, "test")
    ceilings = measure.frame(study, measure.ceilings(study, "mnist", "svhn"))
    rows = ["one network trained on both", "random signs in training, told the task", "trained together, symmetric"]
    assert sorted(ceilings["method"]) == [row for row in rows for _ in range(2 * study.params.ceiling_seeds)]


def test_several_measurements_are_computed_by_processes_that_share_the_cores(study, monkeypatch, tmp_path):
    cases = [
        measure.Case("3", "independent", 0, "main", sums.alone(member), sums.OWN, ("mnist", "svhn"))
        for member in measure.members(study, "independent", ["mnist", "svhn"], 0)
    ]
    here = measure.frame(study, cases)
    several = Study(replace(study.params, networks_at_once=2, results_dir=str(tmp_path)))
    shutil.copytree(study.results / "runs", tmp_path / "runs")  # and no measurements
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(Study, "_load", None)  # not in this process
    pd.testing.assert_frame_equal(measure.frame(several, cases), here)


def test_a_network_trained_alone_does_not_know_its_key(study):
    config = study.config("keys alone", "mnist")
    assert config.method.keys == "none" and config.method.network_width == 0.25
    members = measure.pair_members(study, "keys alone", "mnist", "cifar10", 0)
    key = sums.keyed(study, "keys alone", members).key_of(0)
    theta = study.run(config).networks["main"]
    assert key.sizes["classifier.fc1"] == 2 * len(theta.classifier.fc1.weight)


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


def test_the_queue_holds_every_run_behind_the_tables_a_seed_of_all_rows_first(study):
    queue = plan.queue(study)
    cases = [*measure.pairs(study, "mnist", "cifar10"), *measure.pairs(study, "svhn", "cifar10")]
    cases += measure.strangers(study, "mnist", "svhn")
    summed = [
        ("disjoint keys", [*measure.thirds(study.params).values()]),
        ("random keys", measure.joining(study.params)),
    ]
    further = [member for method, networks in summed for member in measure.members(study, method, networks, 0)]
    assert {member.config for member in [*further, *(m for case in cases for m in case.what.members)]} <= set(queue)
    assert len(set(queue)) == len(queue)
    two = Study(replace(study.params, seeds=2, choice_seeds=1))
    rows = [c for c in plan.queue(two) if c.main == "mnist" and c.support in ("", "cifar10")]
    seeds = [config.seed for config in rows]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1, params.CHOICE}
    parts = {config.method for config in rows if config.seed == params.CHOICE}
    chosen = {"random keys", "keys alone", "disjoint keys", *two.params.parts}
    assert parts == {two.params.method(m).trained() for m in chosen}
