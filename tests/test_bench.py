import json
from dataclasses import replace

import pytest
import torch

from weightsum_lib import bench, run, steps

TINY = steps.Setting("vgg8", 1 / 16, 16, torch.device("cpu"), "float32", rounds=2, dropout=0.0)


def after_steps(way, count=3, **options):
    """The parameters of both networks after some steps on one batch."""
    step, networks = getattr(steps.Bench(TINY), way)(**options)
    for _ in range(count):
        step()
    return [p for n in networks for p in (n.values() if isinstance(n, dict) else n.parameters())]


@pytest.mark.parametrize("way", ["functional", "static", "obvious"])
def test_each_way_of_a_three_term_step_trains_the_same_networks(way):
    ours = after_steps("ours")
    start = after_steps("ours", 0)
    assert max((p - q).abs().max() for p, q in zip(ours, start, strict=True)) > 1e-3
    torch.testing.assert_close(after_steps(way), ours, rtol=1e-3, atol=1e-5)


def test_a_compiled_step_trains_the_same_networks():
    """The graph that is traced, run as it is; on a CPU a compiler's kernels take a minute to make."""
    torch.testing.assert_close(after_steps("ours", backend="aot_eager"), after_steps("ours"), rtol=1e-4, atol=1e-6)


def test_several_seeds_at_once_are_trained_as_one_after_another():
    in_turn = after_steps("in_turn", seeds=2)
    torch.testing.assert_close(after_steps("stacked", seeds=2), in_turn, rtol=1e-3, atol=1e-5)
    half = len(in_turn) // 2
    torch.testing.assert_close(in_turn[:half], after_steps("ours"))  # and they are two seeds
    assert not any(torch.equal(p, q) for p, q in zip(in_turn[:half], in_turn[half:], strict=True) if p.ndim > 1)


def test_a_setting_is_left_out_where_it_would_take_too_long():
    """By the work that it is, so that no minute is lost in finding out."""
    wide = replace(TINY, width=1.0, batch_size=512)
    work = bench.least_seconds(wide, 1.0)
    assert work > 1000 * bench.least_seconds(TINY, 1.0) and bench.least_seconds(wide, 2.0) == work / 2
    assert bench.too_slow(wide, work / (2.1 * wide.budget)) and not bench.too_slow(wide, work / (1.9 * wide.budget))


def test_the_floor_is_three_passes_and_trains_two_networks_that_never_meet():
    floor, plain = after_steps("floor"), after_steps("plain")
    torch.testing.assert_close(floor[: len(plain)], plain)
    assert len(floor) == 2 * len(plain)
    rows = {row["way"]: row for row in bench.step_rows(replace(TINY, rounds=1))}
    work = {way: row["flops_per_second"] * row["seconds"] for way, row in rows.items()}
    assert work["floor"] == pytest.approx(3 * work["plain"]) and work["ours"] == pytest.approx(work["floor"])
    assert all(row["peak_bytes"] >= 0 for row in rows.values()) and rows["floor"]["ratio_to_floor"] == 1


def test_a_measurement_is_written_for_the_report(tmp_path):
    content = bench.measure([TINY], images=40)
    bench.write(content, tmp_path / "results")
    saved = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert {len(row) for t in saved["tables"].values() for row in t["rows"]} <= {3, 6, 7}
    assert [row[1] for row in saved["tables"]["steps"]["rows"]] == [
        bench._LABELS[way] for way in bench.ways(TINY.device)
    ]
    turns = {row["way"]: row["turns"] for row in saved["steps"]}
    of_turns = sorted(a / b for a, b in zip(turns["ours"], turns["floor"], strict=True))
    assert f"takes {(of_turns[0] + of_turns[1]) / 2:.2f} times as long" in saved["values"]["finding"]
    assert {row["way"] for row in saved["several"]} == {"in_turn", "processes", "stacked"}
    # the report takes what was measured here, else what was published
    assert all(p.exists() and p.parent == tmp_path / "results" for p in run.bench_files(tmp_path / "results" / "quick"))
    assert all(p.exists() and p.parent == run.PUBLISHED for p in run.bench_files(tmp_path / "elsewhere" / "quick"))


def test_what_was_measured_on_other_devices_stays_beside_it():
    def measured(*rows):
        return {"tables": {"devices": {"rows": [list(row) for row in rows]}}}

    new, old = measured(("CPU", "float32", "1.02")), measured(("CPU", "float32", "1.30"), ("CPU", "bfloat16", "1.01"))
    assert bench.keep_others(new, old) == measured(("CPU", "float32", "1.02"), ("CPU", "bfloat16", "1.01"))


def test_a_missing_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 2
    assert "DEVICE=cpu" in capsys.readouterr().err
