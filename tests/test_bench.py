import json
from dataclasses import replace

import pytest
import torch

from weightsum_lib import bench, run

TINY = bench.Setting("vgg8", 1 / 16, 16, torch.device("cpu"), "float32", rounds=2, dropout=0.0)


def after_steps(way, steps=3):
    """The parameters of both networks after some steps on one batch."""
    step, networks = getattr(bench.Bench(TINY), way)()
    for _ in range(steps):
        step()
    return [p for n in networks for p in n.parameters()]


@pytest.mark.parametrize("way", ["functional", "static", "obvious"])
def test_each_way_of_a_three_term_step_trains_the_same_networks(way):
    ours = after_steps("ours")
    start = after_steps("ours", 0)
    assert max((p - q).abs().max() for p, q in zip(ours, start, strict=True)) > 1e-3
    torch.testing.assert_close(after_steps(way), ours, rtol=1e-3, atol=1e-5)


def test_the_floor_is_three_passes_and_trains_two_networks_that_never_meet():
    floor, plain = after_steps("floor"), after_steps("plain")
    torch.testing.assert_close(floor[: len(plain)], plain)
    assert len(floor) == 2 * len(plain)
    rows = {row["way"]: row for row in bench.Bench(replace(TINY, rounds=1)).rows()}
    work = {way: row["flops_per_second"] * row["seconds"] for way, row in rows.items()}
    assert work["floor"] == pytest.approx(3 * work["plain"]) and work["ours"] == pytest.approx(work["floor"])
    assert all(row["peak_bytes"] >= 0 for row in rows.values()) and rows["floor"]["ratio_to_floor"] == 1


def test_a_measurement_is_written_for_the_report(tmp_path):
    content = bench.measure([TINY], images=40)
    bench.write(content, tmp_path / "results")
    saved = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert {len(row) for t in saved["tables"].values() for row in t["rows"]} <= {3, 7}
    assert [row[1] for row in saved["tables"]["steps"]["rows"]] == list(bench._LABELS.values())
    seconds = {row["way"]: row["seconds"] for row in saved["steps"]}
    assert f"takes {seconds['ours'] / seconds['floor']:.2f} times as long" in saved["values"]["finding"]
    # the report takes what was measured here, else what was published
    assert all(p.exists() and p.parent == tmp_path / "results" for p in run.bench_files(tmp_path / "results" / "quick"))
    assert all(p.exists() and p.parent == run.PUBLISHED for p in run.bench_files(tmp_path / "elsewhere" / "quick"))


def test_a_missing_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 2
    assert "DEVICE=cpu" in capsys.readouterr().err
