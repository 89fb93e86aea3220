import os

import pytest
import torch

from weightsum_lib import Study, WeightSum, accuracy, cache, draws, evaluate, merging, normalize, params, plots, results
from weightsum_lib import study as study_module
from weightsum_lib import train as train_module
from weightsum_lib.params import ParamsError


@pytest.fixture
def lines(monkeypatch, tmp_path):
    """The progress lines that a study has said."""
    path = tmp_path / "progress"
    path.touch()
    monkeypatch.setenv(study_module.PROGRESS_VARIABLE, str(path))
    return lambda: path.read_text().splitlines()


def test_a_run_is_trained_once_and_then_read(tiny, lines):
    first = Study(tiny)
    config = first.config("joint ce", "mnist", "cifar10")
    trained = first.run(config)
    assert len(lines()) == tiny.epochs
    assert "run 1/1 joint ce mnist+cifar10 seed 0 | epoch 1/2" in lines()[0] and lines()[-1].endswith("0.0 min left")
    again = Study(tiny).run(config)
    assert len(lines()) == tiny.epochs
    for a, b in zip(trained.networks["support"].parameters(), again.networks["support"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.history == trained.history and not again.networks["main"].training


def test_the_key_depends_on_configuration_data_and_code(tiny, monkeypatch):
    study = Study(tiny)
    folder = study._folder(study.config("joint ce", "mnist", "cifar10"))
    assert study._folder(study.config("joint ce", "mnist", "cifar10", seed=1)) != folder
    other = Study(params.read("smoke", {**tiny.as_dict(), "train_images": 130}))
    assert other._folder(other.config("joint ce", "mnist", "cifar10")) != folder
    monkeypatch.setattr(study_module, "_TRAINING_CODE", "another code")
    assert study._folder(study.config("joint ce", "mnist", "cifar10")) != folder


def test_damaged_weights_are_not_used(tiny):
    study = Study(tiny)
    config = study.config("independent", "mnist")
    study.run(config)
    path = study._folder(config) / "networks.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RuntimeError, match=r"networks.safetensors is damaged or missing; delete the folder"):
        Study(tiny).run(config)


def test_fine_tuning_from_the_sum_trains_its_parents_first(tiny, lines):
    study = Study(tiny)
    config = study.config("sequential", "mnist", "cifar10", start="sum")
    study.run(config)
    said = [line.split(" | ")[0].split(" ", 2)[2] for line in lines()]
    assert list(dict.fromkeys(said)) == [
        "independent mnist seed 0",
        "independent cifar10 seed 0",
        "sequential from sum mnist seed 0",
    ]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_networks_trained_at_once_are_those_trained_one_by_one(tiny, tmp_path, lines, two_threads):
    study = Study(params.read("smoke", {**tiny.as_dict(), "networks_at_once": 0}))
    configs = [
        study.config("sequential", "mnist", "cifar10", start="sum"),
        study.config("sequential", "mnist", "cifar10", start="main"),
        study.config("random keys", "mnist", "cifar10"),
    ]
    together = study.train_all(configs)
    said = lines()
    assert len(said) == 5 and ["sequential" in line for line in said] == [False] * 3 + [True] * 2  # parents first
    assert "run 5/5" in said[-1] and " | all 1 epochs " in said[-1] and said[-1].endswith("0.0 min left")
    torch.set_num_threads(1)
    alone = Study(params.read("smoke", {**tiny.as_dict(), "results_dir": str(tmp_path / "alone")})).train_all(configs)
    for a, b in zip(together, alone, strict=True):
        for role in a.networks:
            for p, q in zip(a.networks[role].parameters(), b.networks[role].parameters(), strict=True):
                assert torch.equal(p, q)


def test_what_goes_wrong_in_a_worker_is_said(tiny, two_threads, monkeypatch):
    study = Study(params.read("smoke", {**tiny.as_dict(), "networks_at_once": 2, "learning_rate": 1e30}))
    configs = [study.config("independent", name) for name in ("mnist", "cifar10")]
    with pytest.raises(FloatingPointError, match=r"independent .* the loss is not finite in epoch 1; lower learning"):
        study.train_all(configs)
    monkeypatch.setattr(study_module, "_TRAINING_CODE", "edited since")
    with pytest.raises(RuntimeError, match="was edited while it ran"):
        study.train_all(configs)
    assert not list(study.results.glob("runs/*/run.json"))


def test_progress_goes_to_the_terminal_without_a_runner(capsys, monkeypatch):
    monkeypatch.delenv(study_module.PROGRESS_VARIABLE, raising=False)
    study_module.report_progress("a line")
    assert capsys.readouterr().err == "a line\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_before_training():
    with pytest.raises(ParamsError, match=r"no GPU here. Use PROFILE=quick, or DEVICE=cpu"):
        Study(params.read("full"))
    assert study_module.pick_device("auto") == torch.device("cpu")


def test_bfloat16_only_where_the_processor_has_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(study_module, "_cpu_flags", lambda: {"avx2"})
    assert study_module.pick_precision(cpu) == "float32"
    monkeypatch.setattr(study_module, "_cpu_flags", lambda: {"avx2", "avx512_bf16"})
    assert study_module.pick_precision(cpu) == "bfloat16"


def test_before_and_after_are_what_a_hand_made_sum_measures(tiny):
    study = Study(tiny)
    rows = {row["method"]: row for row in evaluate.before_after(study, "mnist", "cifar10")}
    assert list(rows) == [
        "independent", "shared start", "sequential, from the sum", "sequential, from θ_main",
        "sequential, from random weights", "joint ce", "joint loss_gap", "joint distill", "keys alone", "random keys",
        "disjoint keys",
    ]  # fmt: skip
    pair = study.run(study.config("joint ce", "mnist", "cifar10")).networks
    total = WeightSum([pair["main"], pair["support"]])
    mnist, cifar10 = study.dataset("mnist"), study.dataset("cifar10")
    images = {d.name: d.train_images[: tiny.calibration_images] for d in (mnist, cifar10)}
    row = rows["joint ce"]
    assert row["after"] == accuracy(total, images["mnist"], mnist, study.precision)
    assert row["before"] == accuracy(pair["main"], images["mnist"], mnist, study.precision)
    assert row["support_before"] == accuracy(pair["support"], images["cifar10"], cifar10, study.precision)
    assert row["support_on_main"] == accuracy(pair["support"], images["mnist"], mnist, study.precision)
    assert rows["sequential, from the sum"]["before"] == rows["independent"]["before"]


def test_accuracy_is_the_share_of_right_answers_and_leaves_the_network_alone(datasets):
    d = datasets["mnist"]
    network = study_module.build(study_module.RunConfig("independent", "mnist", width=1 / 16))
    old = {k: v.clone() for k, v in network.state_dict().items()}
    with torch.no_grad():
        network.classifier.fc3.bias[3] += 1000  # it always says 3
    assert accuracy(network, d.train_images, d) == 10.0
    assert accuracy(network, d.train_images, d, split="val") == 10.0
    assert torch.equal(network.features.bn1_1.running_mean, old["features.bn1_1.running_mean"])


def test_a_measurement_is_made_once(tiny, monkeypatch):
    study = Study(tiny)
    rows = evaluate.before_after(study, "mnist", "cifar10")
    monkeypatch.setattr(evaluate, "accuracy", lambda *a, **k: pytest.fail("measured again"))
    assert evaluate.before_after(Study(tiny), "mnist", "cifar10") == rows


def test_unmet_sums_have_two_policies_and_the_controls(tiny):
    study = Study(tiny)
    rows = evaluate.unmet_sums(study, "mnist", "svhn", "cifar10")
    assert {(r["method"], r["policy"]) for r in rows} == {
        (m, policy)
        for m in tiny.methods
        if m != "sequential"
        for policy in evaluate.POLICIES
        if policy != "owner" or m == "disjoint keys"
    }
    row = next(r for r in rows if (r["method"], r["policy"]) == ("joint ce", "union"))
    theta_m = study.run(study.config("joint ce", "mnist", "cifar10")).networks["main"]
    theta_s = study.run(study.config("joint ce", "svhn", "cifar10")).networks["main"]
    mnist, svhn, half = study.dataset("mnist"), study.dataset("svhn"), tiny.calibration_images // 2
    images = torch.cat([mnist.train_images[:half], svhn.train_images[:half]])
    assert row["after_svhn"] == accuracy(WeightSum([theta_m, theta_s]), images, svhn, study.precision)
    assert row["other_mnist"] == accuracy(theta_s, images, mnist, study.precision)
    assert row["before_mnist"] == accuracy(theta_m, images, mnist, study.precision)


def test_the_controls_are_what_they_say(tiny):
    study = Study(tiny)
    rows = evaluate.unmet_sums(study, "mnist", "svhn", "cifar10")
    row = next(r for r in rows if (r["method"], r["policy"]) == ("disjoint keys", "owner"))
    theta_m, theta_s = (
        study.run(study.config("disjoint keys", name, "cifar10")).networks["main"] for name in ("mnist", "svhn")
    )
    svhn = study.dataset("svhn")
    assert row["ensemble_svhn"] == accuracy(merging.Ensemble([theta_m, theta_s]), None, svhn, study.precision)
    assert row["after_svhn"] == pytest.approx(row["ensemble_svhn"], abs=2.6)  # one image of 40: bfloat16
    summed = next(r for r in rows if (r["method"], r["policy"]) == ("disjoint keys", "summed"))
    assert summed["after_svhn"] == row["after_svhn"]  # each channel has one owner
    assert 10 <= row["confidence_svhn"] <= 100
    # with no other network in it, renaming the classes renames the answers
    renaming = torch.arange(10).roll(1)
    renamed = merging.relabelled(theta_s, renaming)
    got = evaluate._renamed(study, renamed, "owner", ("mnist", "svhn"), "svhn", renaming)
    assert got == row["before_svhn"]


def test_a_policy_gives_the_statistics_that_it_names(tiny):
    study = Study(tiny)
    network = study.run(study.config("independent", "mnist")).networks["main"]
    both = ("mnist", "svhn")
    means = {
        p: evaluate.under_policy(study, network, p, both, "mnist").features.bn1_1.running_mean
        for p in evaluate.POLICIES
    }
    assert torch.equal(means["owner"], network.features.bn1_1.running_mean) and means["batch"] is None
    assert not torch.allclose(means["union"], means["per_task"])
    batch = evaluate.under_policy(study, network, "batch", both, "mnist")
    x = normalize(study.dataset("mnist").test_images)
    assert not torch.allclose(batch(x[:20]), batch(x)[:20]) and not batch.training


def test_in_a_disjoint_sum_each_network_explains_all_of_its_own_channels(tiny):
    study = Study(tiny)
    rows = {r["layer"]: r for r in evaluate.explained_variance(study, "disjoint keys", "mnist", "svhn", "cifar10")}
    assert all(rows[layer]["explained"] == pytest.approx(1, abs=1e-6) for layer in rows if layer != "fc3")
    assert rows["fc3"]["explained"] < 1 and rows["fc1"]["overlap"] == 0 and rows["fc3"]["overlap"] == 1
    dense = evaluate.explained_variance(study, "independent", "mnist", "svhn", "cifar10")
    assert max(r["explained"] for r in dense) < 0.9 and {r["overlap"] for r in dense} == {1.0}


def test_more_than_two_networks_and_who_met_whom(tiny):
    study = Study(tiny)
    found = evaluate.many_sum(study, "disjoint keys", ["mnist", "svhn", "cifar10"], 0)
    networks = [
        study.run(study.config("disjoint keys", name, evaluate.support_of(name))).networks["main"]
        for name in ("mnist", "svhn", "cifar10")
    ]
    keys = [train_module.key_of(study.config("disjoint keys", "mnist", "cifar10"), "main", i) for i in range(3)]
    total = WeightSum(networks, keys=keys).add_statistics()
    svhn = study.dataset("svhn")
    assert found["after"][1] == pytest.approx(accuracy(total, None, svhn, study.precision), abs=2.6)
    assert found["before"][1] == accuracy(networks[1], None, svhn, study.precision)
    met = evaluate.many_sum(study, "random keys", ["mnist", "svhn", "cifar10 beside mnist"], 0)
    pair = study.run(study.config("random keys", "mnist", "cifar10")).networks
    wide = evaluate.many_sum(study, "disjoint keys", ["mnist", "svhn", "cifar10 with mnist+svhn"], 0)
    config = study.config("disjoint keys", "cifar10", "mnist+svhn")
    data = study.dataset("cifar10")
    assert wide["before"][2] == accuracy(study.run(config).networks["main"], None, data, study.precision)
    images = evaluate.calibration_images(study, ["mnist", "svhn", "cifar10"])
    assert met["before"][2] == accuracy(pair["support"], images, study.dataset("cifar10"), study.precision)


def test_other_mergers_and_ceilings_have_a_row_each(tiny):
    study = Study(tiny)
    rows = evaluate.merged(study, "mnist", "svhn")
    assert [r["method"] for r in rows] == [
        "sum", "average", "Git Re-Basin, then average", "RegMean", "ensemble of logits",
        "sum with random weights of the partner's norms", "task arithmetic from a shared start, × 0.5",
        "task arithmetic from a shared start, × 1",
    ]  # fmt: skip
    unmet = evaluate.unmet_sums(study, "mnist", "svhn", "cifar10")
    same = next(r for r in unmet if (r["method"], r["policy"]) == ("independent", "union"))
    assert (rows[0]["after_mnist"], rows[4]["after_svhn"]) == (same["after_mnist"], same["ensemble_svhn"])
    assert len(evaluate.ceilings(study, "mnist", "svhn")) == 2 * tiny.ceiling_seeds
    both = study.dataset("mnist+svhn")
    assert len(both.train_labels) == sum(len(study.dataset(n).train_labels) for n in ("mnist", "svhn"))
    inverted = study.dataset("svhn inverted")
    assert torch.equal(255 - inverted.test_images, study.dataset("svhn").test_images)
    assert inverted.training_digest != study.dataset("svhn").training_digest


def test_redrawn_keys_move_the_networks_and_change_nothing_else(tiny):
    parts = {
        "other size": {**tiny.methods["random keys"], "wider": 2.0},
        "other recipe": {**tiny.methods["random keys"], "quiet": 0.0},
    }
    study = Study(params.read("smoke", {**tiny.as_dict(), "parts": parts}))
    assert draws.recipe_rows(study, "random keys") == ["random keys", "other size"]
    assert draws.size(study, "other size") == 2 * draws.size(study, "random keys")
    (row,) = draws.redrawn(study, "random keys", "mnist", "svhn", "cifar10")
    unmet = evaluate.unmet_sums(study, "mnist", "svhn", "cifar10")
    same = next(r for r in unmet if (r["method"], r["policy"]) == ("random keys", "union"))
    for name in ("mnist", "svhn"):  # the first draw is that of the other tables
        assert row[f"before_{name}"] == same[f"before_{name}"]
        assert row[f"draws_{name}"][0] == 100 * same[f"after_{name}"] / same[f"before_{name}"]
        assert len(row[f"draws_{name}"]) == draws.DRAWS and len(set(row[f"draws_{name}"])) > 1
        assert row[f"kept_{name}"] == pytest.approx(100 * row[f"after_{name}"] / row[f"before_{name}"])
    assert draws.redrawn(study, "random keys", "mnist", "svhn", "cifar10") == [row]
    summary = results.summarize([row], ["method"], ["kept_mnist", "kept_svhn"])
    figure = plots.draws([row], summary, {"mnist": "MNIST", "svhn": "SVHN"}, "message")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["random keys (n = 1)"]


def test_a_network_trained_alone_does_not_know_its_key(tiny):
    study = Study(tiny)
    config = study.config("keys alone", "mnist")
    assert (config.width, config.keys) == (tiny.width / 4, "none")
    (theta_m, key), _ = evaluate.pair_members(study, "keys alone", "mnist", "cifar10", 0)
    assert key.sizes["classifier.fc1"] == 4 * len(theta_m.classifier.fc1.weight)
    assert evaluate.same_size_alone(study, "random keys") == "keys alone"
    assert evaluate.same_size_alone(study, "joint ce") == "independent"


def test_the_plane_holds_the_sum_and_the_networks_alone(tiny):
    study = Study(tiny)
    plane = evaluate.coefficient_plane(study, "joint ce", "mnist", "cifar10")
    c = plane["coefficients"]
    assert len(c) == tiny.plane_points and c[0] == 0
    study = Study(params.read("smoke", {**tiny.as_dict(), "plane_points": 7}))
    plane = evaluate.coefficient_plane(study, "joint ce", "mnist", "svhn", "cifar10")
    one = plane["coefficients"].index(1.0)
    theta_m = study.run(study.config("joint ce", "mnist", "cifar10")).networks["main"]
    mnist = study.dataset("mnist")
    alone = accuracy(theta_m, mnist.train_images[: tiny.calibration_images], mnist, study.precision, "val", 300)
    assert plane["mnist"][one][0] == alone


def test_figures_and_tables_of_a_whole_page(tiny):
    plots.use_style()
    study = Study(tiny)
    evaluate.train_pairs(study, "mnist", "cifar10")
    layers = evaluate.layer_rows(study, "mnist", "cifar10")
    assert {r["method"] for r in layers} == {m for m in tiny.methods if m != "sequential"}
    assert len(results.layer_table(layers)) == len(tiny.methods) - 1
    figure = plots.layers(layers, "message")
    assert "‖W_main‖ / ‖W_support‖" in figure.axes[0].get_ylabel()
    history = study.run(study.config("joint ce", "mnist", "cifar10")).history
    figure = plots.curves({"joint ce": history}, "message", "MNIST", "CIFAR-10")
    assert [a.get_ylabel() for a in figure.axes] == ["training loss (nats)", "validation accuracy (%)"]
    titles = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
    figure = plots.plane({"joint ce": evaluate.coefficient_plane(study, "joint ce", *titles)}, titles, "message")
    assert "coefficient of θ of MNIST" in figure.axes[0].get_ylabel()
    assert plots.examples([study.dataset("mnist")], "message").axes
    rows = evaluate.unmet_sums(study, "mnist", "svhn", "cifar10")
    titles = {"mnist": "MNIST", "svhn": "SVHN"}
    for name in titles:
        rows = results.with_gap(rows, f"before_{name}", f"after_{name}", suffix=f"_{name}")
    rows = results.loss_split([r for r in rows if "other_svhn" in r], titles)
    columns = [c for c in rows[0] if c not in ("method", "seed", "policy")]
    union = results.summarize([r for r in rows if r["policy"] == "union"], ["method", "policy"], columns)
    row = union[0]
    lost = row["loudness_svhn"]["mean"] + row["interference_svhn"]["mean"]
    assert lost == pytest.approx(row["before_svhn"]["mean"] - row["after_svhn"]["mean"])
    assert len(plots.unmet(union, "mnist", "svhn", titles, "message").axes) == 2
    assert list(results.unmet_table(union, "svhn"))[:3] == ["Method", "Policy", "Before (%)"]
    by_method = {r["method"]: r for r in union}
    shown = {m: by_method[m] for m in ("independent", "random keys")}
    text = results.finding_unmet(shown, {"random keys": False}, titles)
    assert "alone, θ of SVHN reads" in text and "`random keys` (policy `union`, n = 1)" in text
    assert "already worse before the sum" in text
    explained = evaluate.explained_variance(study, "disjoint keys", "mnist", "svhn", "cifar10")
    assert len(plots.why(explained, union, titles, "message").axes) == 3
    figure = plots.policies(union, {"after_svhn": "SVHN"}, list(evaluate.POLICIES), "message")
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()][2] == "per\ntask"
    line = [{**r, "overlap": 0.25, "line": r["method"] == "random keys"} for r in union]
    figure = plots.against_overlap(line, titles, {"mnist": 60.0, "svhn": 12.0}, "message")
    assert "channels in common" in figure.axes[0].get_xlabel()
    grown = [{"method": "a", "networks": n, "task": "MNIST", "kept": 90.0} for n in (2, 3)]
    assert plots.number_of_networks(grown, "message").axes[0].get_xlabel() == "networks in the sum"
    path = results.save("03_x", study, results.values_of(union, columns), {"t": results.unmet_table(union, "svhn")})
    saved = cache.read_json(path)
    assert saved["values"]["joint_ce.after_svhn"] == by_method["joint ce"]["after_svhn"]["mean"]
    assert saved["provenance"]["data"]["svhn"]["source"] == "stand-in"
    assert sum(saved["provenance"]["training_seconds"].values()) > 0 and os.path.dirname(path).endswith("smoke")
