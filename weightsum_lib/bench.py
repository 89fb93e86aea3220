"""``make bench``: the speed of the three-term step, beside one plain step, its floor, and other ways of doing it."""

import argparse
import ctypes
import gc
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from weightsum_lib import cache, params, plots, results, run
from weightsum_lib.batchnorm import recalibrate
from weightsum_lib.models import normalize
from weightsum_lib.steps import Bench, Setting, random_dataset
from weightsum_lib.study import pick_device, pick_precision
from weightsum_lib.train import autocast, build, count_correct
from weightsum_lib.weights import WeightSum

_TESTED_IMAGES = 10_000
_LEAST_ROUNDS = 3
_AHEAD = 6  # steps after which a loader has no more ready than it will have
_LABELS = {  # what a row is called in the report
    "plain": "one plain step of one network",
    "floor": "floor: three passes, two optimisers",
    "ours": "three-term step",
    "ours_fed": "three-term step and its batches",
    "compiled": "three-term step, compiled",
    "graphed": "three-term step, compiled, CUDA graphs",
    "functional": "`functional_call` on added weights",
    "static": "third module, filled by `_foreach_add`",
    "obvious": "the obvious way, float32",
    "obvious_fed": "the obvious way and its loader",
}
_GPU_ONLY = ("compiled", "graphed")  # on a CPU a compiled step gains nothing and takes a minute to compile
_SEVERAL = {
    "in_turn": "one pair after another",
    "processes": "a process each, with its share of the cores",
    "streams": "a CUDA stream each",
    "stacked": "stacked, `vmap`",
}


def ways(device: torch.device) -> list[str]:
    """The ways of making a step that are measured on a device, in the order of the table."""
    return [way for way in _LABELS if device.type == "cuda" or way not in _GPU_ONLY]


def step_rows(setting: Setting) -> list[dict]:
    """Measure every way: those on a fixed batch in turns, those with a loader each for itself.

    A ratio is the median of the ratios turn by turn, so that a machine that slows down for a while doesn't show in it.
    """
    bench, device = Bench(setting), setting.device
    started, steps, memory, flops, seconds = time.perf_counter(), {}, {}, {}, {}
    for name in ways(device):
        base = _memory_now(device)
        step, _ = getattr(bench, name)()
        with FlopCounterMode(display=False) if name not in _GPU_ONLY else nullcontext() as counter:
            step()  # the first one, which is slow
        steps[name], memory[name], seconds[name] = step, _memory_peak(device) - base, []
        flops[name] = flops["ours"] if name in _GPU_ONLY else counter.get_total_flops()
    fed = [name for name in steps if name.endswith("_fed")]
    for turn in range(setting.rounds):
        order = [name for name in steps if name not in fed]
        random.Random(turn).shuffle(order)
        for name in order:
            seconds[name].append(_seconds(steps[name], device))
        if turn + 1 >= _LEAST_ROUNDS and time.perf_counter() - started > setting.budget:
            break
    for name in fed:  # a loader works ahead while others run: use that up first
        times = [_seconds(steps[name], device) for _ in range(_AHEAD + len(seconds["floor"]))]
        seconds[name] = times[_AHEAD:]
    return [
        {
            "way": name,
            "label": _LABELS[name],
            "turns": times,
            "seconds": statistics.median(times),
            "quartiles": np.quantile(times, [0.25, 0.75]).tolist(),
            "triplets_per_second": setting.batch_size / statistics.median(times),
            "ratio_to_floor": ratio(times, seconds["floor"]),
            "ratio_quartiles": np.quantile(np.divide(times, seconds["floor"]), [0.25, 0.75]).tolist(),
            "flops_per_second": flops[name] / statistics.median(times),
            "peak_bytes": memory[name],
        }
        for name, times in seconds.items()
    ]


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """How many times as long one way took as another: the median over turns."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def several_rows(setting: Setting, seeds: int) -> list[dict]:
    """Measure the ways of training several seeds' pairs at once, in turns; seconds of a step of all of them."""
    bench, device = Bench(setting), setting.device
    names = ["in_turn", "streams", "stacked"] if device.type == "cuda" else ["in_turn", "processes", "stacked"]
    pool = _Processes(setting, seeds) if "processes" in names else None
    steps = {name: pool.step if name == "processes" else getattr(bench, name)(seeds)[0] for name in names}
    seconds = {name: [] for name in names}
    for step in steps.values():
        step()
    started = time.perf_counter()
    for turn in range(setting.rounds):
        for name, step in steps.items():
            seconds[name].append(_seconds(step, device))
        if turn + 1 >= _LEAST_ROUNDS and time.perf_counter() - started > setting.budget:
            break
    if pool:
        pool.end()
    return [
        {
            "way": name,
            "label": _SEVERAL[name],
            "seeds": seeds,
            "turns": times,
            "seconds": statistics.median(times),
            "ratio_to_in_turn": ratio(times, seconds["in_turn"]),
        }
        for name, times in seconds.items()
    ]


class _Processes:
    """A process for each seed, which makes a step when it is told to."""

    def __init__(self, setting: Setting, seeds: int):
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // seeds)
        self.pipes, self.processes = [], []
        for seed in range(seeds):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=_serve_steps, args=(setting, seed, threads, theirs)))
            self.processes[-1].start()

    def step(self):
        for pipe in self.pipes:
            pipe.send(True)
        for pipe in self.pipes:
            pipe.recv()

    def end(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(False)
            process.join()


def _serve_steps(setting: Setting, seed: int, threads: int, pipe) -> None:
    torch.set_num_threads(threads)
    step, _ = Bench(setting).ours(seed=seed)
    while pipe.recv():
        step()
        pipe.send(True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - started


def _memory_now(device: torch.device) -> int:
    """Bytes in use; from here on the peak is recorded. NaN where a CPU's can't be had (not Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory starts anew
    except (AttributeError, OSError):
        return 0
    return _status("VmRSS")


def _memory_peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> float:
    """A line of this process's status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def matmul_rate(device: torch.device, precision: str) -> float:
    """The device's measured rate of matrix products, FLOP/s: the best of ten square ones."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(_seconds(lambda: a @ b, device) for _ in range(10))


@torch.no_grad()
def evaluation_rows(setting: Setting, images: int = _TESTED_IMAGES) -> list[dict]:
    """How fast a sum is tested and recalibrated, beside a plain network; images a second, medians of three."""
    config, device = setting.config, setting.device
    data = random_dataset("mnist", images).to(device)
    networks = [build(config, role).to(device).eval() for role in ("main", "support")]
    total = WeightSum(networks).eval()
    calibration = normalize(data.train_images[: max(2, images // 10)])

    def test(network):
        count_correct(network, data.train_images, data.train_labels, config.precision)

    def recalibrated():
        with autocast(config.precision, device):
            recalibrate(total, calibration)

    ways = {
        "a plain network is tested": (lambda: test(networks[0]), images),
        "a sum is tested": (lambda: test(total.materialize().eval()), images),
        "a sum is recalibrated": (recalibrated, len(calibration)),
    }
    for function, _ in ways.values():
        function()
    times = {way: [] for way in ways}
    for _ in range(3):
        for way, (function, _) in ways.items():
            times[way].append(_seconds(function, device))
    return [
        {"way": way, "images": n, "images_per_second": n / statistics.median(times[way])}
        for way, (_, n) in ways.items()
    ]


def layout_rows(device: torch.device, precision: str) -> list[dict]:
    """Forward and backward pass of batch norm in both memory layouts, by channels (128 images 32×32); seconds."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    rows = []
    for channels in (8, 14, 16, 28, 32, 64):
        row = {"channels": channels}
        for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
            x = torch.randn(128, channels, 32, 32, device=device, dtype=dtype).contiguous(memory_format=layout)
            norm, x = nn.BatchNorm2d(channels).to(device), x.requires_grad_()
            gradient = torch.randn_like(x)
            run = lambda norm=norm, x=x, gradient=gradient: norm(x).backward(gradient)  # noqa: E731
            run()
            row[name] = statistics.median(_seconds(run, device) for _ in range(7))
        rows.append(row)
    return rows


def settings(device: torch.device, precision: str) -> list[Setting]:
    """What is measured on a device: on a CPU each in about half a minute, and only what can be."""
    quarter = Setting("vgg16", 0.25, 128, device, precision, rounds=20, budget=25.0)
    return [replace(quarter, width=w, batch_size=b) for w in (0.25, 1.0) for b in (128, 512)]


def too_slow(setting: Setting, rate: float) -> bool:
    """Whether a setting can't be measured within twice its budget on a device of that ``rate``."""
    return least_seconds(setting, rate) > 2 * setting.budget


def least_seconds(setting: Setting, rate: float) -> float:
    """What a setting takes at least, were all its work matrix products at the device's ``rate`` (FLOP/s)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(setting.config)(torch.empty(1, 3, 32, 32))
    pass_of_one = 3 * counter.get_total_flops() / rate  # the backward pass is twice the forward pass
    steps = (len(ways(setting.device)) - 1) * (1 + _LEAST_ROUNDS) + 2 * _AHEAD
    return 3 * pass_of_one * setting.batch_size * steps


def measure(chosen: Sequence[Setting], images: int = _TESTED_IMAGES, seeds: int = 2) -> dict:
    """All tables, as results that the report can read.

    Args:
        chosen: the settings; one that can't be measured within twice its budget is left out, and the result says so.
        images: that the evaluation is timed on.
        seeds: that are trained at once, in the smallest setting.
    """
    device, precision = chosen[0].device, chosen[0].precision
    rate = matmul_rate(device, precision)
    steps, left_out = [], []
    for setting in chosen:
        name = f"{setting.arch.upper()}, width {setting.width:g}, batch {setting.batch_size}"
        if too_slow(setting, rate):
            left_out.append(name.partition(", ")[2])
            print(f"{name}: left out, it would take more than {2 * setting.budget:.0f} s here", flush=True)
            continue
        print(f"{name} …", flush=True)
        steps += [
            {
                "setting": name,
                "width": setting.width,
                "batch_size": setting.batch_size,
                **row,
                "share": row["flops_per_second"] / rate,
            }
            for row in step_rows(setting)
        ]
        gc.collect()
    print("several seeds, evaluation, layouts …", flush=True)
    several = several_rows(chosen[0], seeds)
    tested = evaluation_rows(chosen[0], images)
    layouts = layout_rows(device, precision)
    values = {
        "device": _device_name(device),
        "precision": precision,
        "matmul_rate": f"{rate / 1e12:.2g} TFLOP/s",
    }
    return {
        "notebook": "bench",
        "steps": steps,
        "several": several,
        "values": {
            "finding": finding(steps),
            **values,
            "network": chosen[0].arch.upper(),
            "left_out": f"Left out, since too slow here: {'; '.join(left_out)}." if left_out else "",
            "several": several_finding(several),
            "versions": f"torch {torch.__version__}, Python {sys.version.split()[0]}, commit {cache.commit()}",
        },
        "tables": {
            "steps": results.as_json_table(pd.DataFrame(map(_as_shown, steps))),
            "devices": {
                "columns": [
                    "Device",
                    "Forward pass in",
                    "Three-term step / floor",
                    "Obvious way / three-term step",
                    "Each with its batches",
                    "Matrix products",
                ],
                "rows": [[*list(values.values())[:2], *_ratios(steps), values["matmul_rate"]]],
            },
            "several": {
                "columns": ["Pairs at once", "ms for a step of each", "× one after another"],
                "rows": [
                    [f"{r['seeds']}: {r['label']}", f"{1e3 * r['seconds']:,.0f}", f"{r['ratio_to_in_turn']:.2f}"]
                    for r in several
                ],
            },
            "evaluation": {
                "columns": ["What", "Images", "Images a second"],
                "rows": [[r["way"], f"{r['images']:,}", f"{r['images_per_second']:,.0f}"] for r in tested],
            },
            "layouts": {
                "columns": ["Channels", "Channels last (ms)", "Channels first (ms)"],
                "rows": [
                    [str(r["channels"]), f"{1e3 * r['channels_last']:.1f}", f"{1e3 * r['contiguous']:.1f}"]
                    for r in layouts
                ],
            },
        },
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def keep_others(content: dict, earlier: dict) -> dict:
    """Add to the table of devices those that an earlier measurement has and this one has not."""
    table = content["tables"]["devices"]
    measured = [row[:2] for row in table["rows"]]
    table["rows"] += [row for row in earlier["tables"]["devices"]["rows"] if row[:2] not in measured]
    return content


def _as_shown(row: dict) -> dict[str, str]:
    """A line of the table of steps."""
    low, high = row["quartiles"]
    return {
        "Width, batch": f"{row['width']:g}, {row['batch_size']}",
        "Step": row["label"],
        "ms (quartiles)": f"{1e3 * row['seconds']:,.0f} ({1e3 * low:,.0f}–{1e3 * high:,.0f})",
        "Triplets/s": f"{row['triplets_per_second']:,.0f}",
        "× floor": f"{row['ratio_to_floor']:.2f}",
        "% of peak": f"{100 * row['share']:.0f}",
        "MiB": f"{row['peak_bytes'] / 2**20:,.0f}",
    }


def _ratios(steps: Sequence[dict]) -> list[str]:
    """From the lowest to the highest setting: our step / its floor, the obvious way / ours, each with its batches."""
    turns = {(row["setting"], row["way"]): row["turns"] for row in steps}
    every = list(dict.fromkeys(row["setting"] for row in steps))
    texts = []
    for way, over, form in (("ours", "floor", ".2f"), ("obvious", "ours", ".1f"), ("obvious_fed", "ours_fed", ".1f")):
        ratios = sorted(ratio(turns[s, way], turns[s, over]) for s in every)
        low, high = format(ratios[0], form), format(ratios[-1], form)
        texts.append(low if low == high else f"{low} to {high}")
    return texts


def finding(steps: Sequence[dict]) -> str:
    """What the table of steps says, in two sentences."""
    of_floor, obvious, fed = _ratios(steps)
    return (
        f"The three-term step takes {of_floor} times as long as its floor, three forward and backward passes and two "
        f"optimizer steps. The obvious way takes {obvious} times as long as the three-term step; each with its "
        f"batches, {fed} times."
    )


def several_finding(rows: Sequence[dict]) -> str:
    """Which way of training several seeds is the fastest, in one sentence."""
    best, worst = (f(rows, key=lambda r: r["ratio_to_in_turn"]) for f in (min, max))
    return (
        f"The fastest way to train {best['seeds']} seeds is {best['label']}, the slowest {worst['label']}: "
        f"{best['ratio_to_in_turn']:.2f} and {worst['ratio_to_in_turn']:.2f} of the time of one pair after another."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: measure, print the tables, and write ``results/bench.json`` and ``bench.png``."""
    parser = argparse.ArgumentParser(prog="python -m weightsum_lib.bench", description=__doc__)
    parser.add_argument("--device", default="", help="cpu or cuda; by default a GPU where there is one")
    try:
        device = pick_device(parser.parse_args(argv).device or "auto")
    except params.ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    content = measure(settings(device, pick_precision(device)))
    folder = cache.PACKAGE.parent / params.read("quick").results_dir
    keep_others(content, cache.read_json(run.bench_files(folder / "quick")[0]))
    path = write(content, folder)
    for name, table in content["tables"].items():
        print(f"\n{name}")
        rows = [table["columns"], *table["rows"]]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table["columns"]))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    print(f"\n{content['values']['finding']}\n{path}")
    return 0


def write(content: dict, folder: Path) -> Path:
    """Write ``bench.json`` and its figure; returns the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    plots.use_style()
    figure = plots.speed(content["steps"], content["values"]["device"])
    # no date or version inside: the same results give the same file
    figure.savefig(folder / "bench.png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    cache.write_json(folder / "bench.json", content)
    return folder / "bench.json"


if __name__ == "__main__":
    sys.exit(main())
