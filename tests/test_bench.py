from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from weightsum_lib import bench, run
from weightsum_lib.study import store, train
from weightsum_lib.study.params import Method

CPU = torch.device("cpu")
TINY = train.RunConfig(Method(protocol="joint", third="ce"), "mnist", "cifar10", arch="vgg8", width=1 / 16,
                       batch_size=16, dropout=0.0, learning_rate=1e-3)  # fmt: skip


def after_steps(way, count=3):
    """The parameters of both networks after some steps."""
    step, networks = bench.begin(way, TINY, CPU)
    for _ in range(count):
        step()
    return [p.detach() for network in networks for p in network.parameters()]


@pytest.fixture(scope="module")
def ours():
    start, ours = after_steps("ours", 0), after_steps("ours")
    assert max((p - q).abs().max() for p, q in zip(ours, start, strict=True)) > 1e-3
    return ours


@pytest.mark.parametrize("way", ["in_place", "obvious"])
def test_each_way_of_a_three_term_step_trains_the_same_networks(ours, way):
    torch.testing.assert_close(after_steps(way), ours, rtol=1e-3, atol=1e-5)


def test_our_step_is_that_of_training(ours, monkeypatch):
    """The same batches and learning rate: the same networks, bit for bit."""
    config = replace(TINY, epoch_images=3 * TINY.batch_size)
    data = {name: bench._noise(name, 20 * TINY.batch_size, CPU) for name in TINY.roles.values()}
    monkeypatch.setattr(train, "_learning_rate", lambda config, progress: config.learning_rate)
    trained = train.train(config, data).networks.values()
    parameters = [p for network in trained for p in network.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(parameters, after_steps("ours_fed"), strict=True))


def test_the_floor_is_three_passes_and_trains_two_networks_that_never_meet():
    work = {}
    for way in ("plain", "floor", "ours"):
        step, _ = bench.begin(way, TINY, CPU)
        with FlopCounterMode(display=False) as counter:
            step()
        work[way] = counter.get_total_flops()
    assert work["floor"] == work["ours"] == 3 * work["plain"] == pytest.approx(bench.work(TINY))
    floor, plain, start = after_steps("floor"), after_steps("plain"), after_steps("plain", 0)
    half = len(floor) // 2
    assert all(torch.equal(p, q) for p, q in zip(floor[:half], plain[:half], strict=True))
    assert all(torch.equal(p, q) for p, q in zip(start[half:], plain[half:], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(start[half:], floor[half:], strict=True) if p.ndim > 1)


def test_turns_go_on_while_there_is_time():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    assert len(bench.in_turns(steps)) == 20 and len(bench.in_turns(steps, seconds=0)) == 3
    turns = ["".join(calls[i : i + 3]) for i in range(3, 63, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 1


def test_a_measurement_is_written_for_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_SECONDS", 1e-9)
    steps, content = bench.measure([TINY], CPU)
    here = content["values"]["device"]
    earlier = {"tables": {"devices": {"rows": [[here, "float32", *"9999"], ["a GPU", "bfloat16", *"1111"]]}}}
    bench.write(steps, content, tmp_path / "results", earlier)
    saved = store.read_json(tmp_path / "results" / "bench.json")
    for name, columns in {"steps": 6, "devices": 6}.items():
        table = saved["tables"][name]
        assert {len(row) for row in [table["columns"], *table["rows"]]} == {columns}
    assert [row[1] for row in saved["tables"]["steps"]["rows"]] == [*bench.WAYS.values()]
    rows = steps.set_index("way")
    of_turns = sorted(a / b for a, b in zip(rows["turns"]["ours"], rows["turns"]["floor"], strict=True))
    assert f"takes {of_turns[1]:.2f} times as long" in saved["values"]["finding"]
    assert rows["× floor"]["ours"] == f"{of_turns[1]:.2f}"
    ends = sum(of_turns[:2]) / 2, sum(of_turns[1:]) / 2
    assert rows["ratio_to_floor"]["ours"] == pytest.approx((of_turns[1], *ends, 3))
    # what was measured on other devices stays beside it
    assert [row[:2] for row in saved["tables"]["devices"]["rows"]] == [[here, "float32"], ["a GPU", "bfloat16"]]
    assert saved["tables"]["devices"]["rows"][0][2] == f"{of_turns[1]:.2f}"
    # the report takes what was measured here, else what was published
    here, elsewhere = (run.standing(tmp_path / folder / "quick") for folder in ("results", "elsewhere"))
    assert all(
        here[name] == tmp_path / "results" / name and here[name].exists() for name in ("bench.json", "bench.png")
    )
    assert all(p.exists() and p.parent == run.PUBLISHED for p in elsewhere.values())


def test_ratios_are_told_from_the_lowest_to_the_highest_setting():
    rows = [("small", "ours", [1.0, 2.0, 9.0]), ("small", "floor", [1.0, 1.0, 3.0]),
            ("large", "ours", [3.0, 3.0, 3.0]), ("large", "floor", [2.0, 2.0, 2.0])]  # fmt: skip
    steps = pd.DataFrame(rows, columns=["setting", "way", "turns"])
    assert bench.between(steps, "ours", "floor", ".1f") == "1.5 to 2.0"
    assert bench.between(steps, "ours", "ours", ".1f") == "1.0"


def test_a_missing_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["bench", "--device", "cuda"]) == 2
    assert "DEVICE=cpu" in capsys.readouterr().err
