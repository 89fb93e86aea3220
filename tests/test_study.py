import os

import pytest
import torch

from weightsum_lib import Study, WeightSum, accuracy, cache, evaluate, params, plots, results
from weightsum_lib import study as study_module
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
        "independent", "sequential, from the sum", "sequential, from θ_main", "sequential, from random weights",
        "joint ce", "joint loss_gap", "joint distill",
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
        (m, policy) for m in tiny.methods if m != "sequential" for policy in ("union", "per_task")
    }
    row = next(r for r in rows if (r["method"], r["policy"]) == ("joint ce", "union"))
    theta_m = study.run(study.config("joint ce", "mnist", "cifar10")).networks["main"]
    theta_s = study.run(study.config("joint ce", "svhn", "cifar10")).networks["main"]
    mnist, svhn, half = study.dataset("mnist"), study.dataset("svhn"), tiny.calibration_images // 2
    images = torch.cat([mnist.train_images[:half], svhn.train_images[:half]])
    assert row["after_svhn"] == accuracy(WeightSum([theta_m, theta_s]), images, svhn, study.precision)
    assert row["other_mnist"] == accuracy(theta_s, images, mnist, study.precision)
    assert row["before_mnist"] == accuracy(theta_m, images, mnist, study.precision)


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
    columns = [f"{kind}_{name}" for name in titles for kind in ("before", "after", "gap", "kept", "other")]
    union = results.summarize([r for r in rows if r["policy"] == "union"], ["method"], columns)
    assert len(plots.unmet(union, "mnist", "svhn", titles, "message").axes) == 2
    assert len(results.unmet_table(union, titles).columns) == 10
    by_method = {r["method"]: r for r in union}
    text = results.finding_unmet(by_method["independent"], by_method["joint ce"], True, titles)
    assert "Control: alone, θ of SVHN reads" in text
    path = results.save("03_x", study, results.values_of(union, columns), {"t": results.unmet_table(union, titles)})
    saved = cache.read_json(path)
    assert saved["values"]["joint_ce.after_svhn"] == by_method["joint ce"]["after_svhn"]["mean"]
    assert saved["provenance"]["data"]["svhn"]["source"] == "stand-in"
    assert saved["provenance"]["training_seconds"] > 0 and os.path.dirname(path).endswith("smoke")
