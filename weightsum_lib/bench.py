"""``make bench``: the speed of the three-term step, beside one plain step, its floor, and other ways of doing it."""

import argparse
import functools
import itertools
import os
import random
import sys
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import benchmark, flop_counter
from torch.utils.data import DataLoader, default_collate

from weightsum_lib import run
from weightsum_lib.core import batchnorm, models
from weightsum_lib.core.weights import WeightSum
from weightsum_lib.report import plots, tables
from weightsum_lib.study import data, params, runs, store, train
from weightsum_lib.study.train import RunConfig

_MOST_TURNS, _LEAST_TURNS, _SECONDS = 20, 3, 25.0  # how often the ways of a setting are timed, in about how long
_AHEAD = 6  # steps after which a loader has no more ready than it will have


def _noise(name: str, images: int, device: torch.device) -> data.Dataset:
    """Images of noise, which cost what others cost."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    y = torch.randint(0, 10, (images,), generator=generator)
    return data.Dataset(name, "stand-in", "noise", "", x, y, x[:1], y[:1], x[:1], y[:1]).to(device)


def _batches(config: RunConfig, device: torch.device, loaders: bool) -> Iterator[dict]:
    """Batches without end, (x, y) by role: as in training, or from loaders such as tutorials have."""
    noise = {role: _noise(name, 20 * config.batch_size, device) for role, name in config.roles.items()}
    loaded = [_loader(dataset, config.batch_size) for dataset in noise.values()] if loaders else None
    for epoch in itertools.count():
        feeds = loaded or [train.batches(config, role, dataset, epoch, 20) for role, dataset in noise.items()]
        for pairs in zip(*feeds, strict=True):
            yield {role: (x.to(device), y.to(device)) for role, (x, y) in zip(noise, pairs, strict=True)}


def _loader(dataset: data.Dataset, batch_size: int) -> DataLoader:
    """Two workers, which take PIL images through torchvision's transforms, one by one."""
    from torchvision.transforms import Compose, Normalize, RandomCrop, ToTensor, functional  # slow to import

    look = Compose([RandomCrop(32, padding=2), ToTensor(), Normalize([0.5] * 3, [0.25] * 3)])
    rows = [*zip(map(functional.to_pil_image, dataset.train_images.cpu()), dataset.train_labels.tolist(), strict=True)]
    how = {"num_workers": 2, "persistent_workers": True, "collate_fn": functools.partial(_collate, look)}
    return DataLoader(rows, batch_size, shuffle=True, drop_last=True, pin_memory=torch.cuda.is_available(), **how)


def _collate(look: Callable, rows: Sequence[tuple]) -> list[Tensor]:
    return default_collate([(look(picture), label) for picture, label in rows])


WAYS = {  # of making a step, and what the report calls each; "_fed": on a new batch each time
    "plain": "one plain step of one network",
    "floor": "floor: three passes, two optimisers",
    "ours": "three-term step",
    "compiled": "three-term step, compiled",
    "functional": "`functional_call` on added weights",
    "static": "third module, filled by `_foreach_add`",
    "obvious": "the obvious way, float32",
    "ours_fed": "three-term step and its batches",
    "obvious_fed": "the obvious way and its loader",
}


def ways(device: torch.device) -> list[str]:
    """The ways that are measured: compiled, a step gains nothing on a CPU, and takes a minute to get ready."""
    return [way for way in WAYS if way != "compiled" or device.type == "cuda"]


def _sum(kind: str, pair: Sequence[nn.Module], third: nn.Module) -> tuple[Callable | None, Callable | None]:
    """What answers as the sum of a pair in one kind of step, and what writes the sum into the third network first."""

    def added() -> dict[str, Tensor]:
        named = zip(*(network.named_parameters() for network in pair), strict=True)
        return {name: p + q for (name, p), (_, q) in named}

    def fill_in_place():
        first, second, weights = ([*network.parameters()] for network in (*pair, third))
        torch._foreach_copy_(weights, first)
        torch._foreach_add_(weights, second)

    return {
        "plain": (None, None),
        "floor": (third, None),
        "functional": (lambda x: torch.func.functional_call(third, added(), (x,)), None),
        "static": (third, fill_in_place),
        "obvious": (third, lambda: third.load_state_dict(added(), strict=False)),
    }.get(kind) or (WeightSum(pair), None)


def begin(way: str, config: RunConfig, device: torch.device, seed: int = 0, **compiler) -> tuple[Callable, list]:
    """Start to make steps in one of the :data:`WAYS`, on networks of its own.

    Args:
        way: its name.
        config: of a joint run whose third term is ``ce``.
        device: where.
        seed: of the networks; the batches are the same for all.
        compiler: arguments of ``torch.compile`` for the way "compiled".

    Returns:
        a function that makes one step, and the two networks.
    """
    kind = way.removesuffix("_fed")
    roles = ("main", "support", "main")  # a third network of the same architecture, for the ways that want one
    networks = [train.build(replace(config, seed=seed), role).to(device).train() for role in roles]
    if kind == "obvious":
        config = replace(config, precision="float32")
        networks = [network.to(memory_format=torch.contiguous_format) for network in networks]
    *pair, third = networks
    *own, filled = [[*network.parameters()] for network in networks]
    parameters, by_role = [*own[0], *own[1]], dict(zip(config.roles, pair, strict=True))
    total, fill = _sum(kind, pair, third)
    feed = _batches(config, device, loaders=way == "obvious_fed")
    feed = feed if way.endswith("_fed") else itertools.repeat(next(feed))
    optimizer = train.optimizer_of(config, parameters, fused=kind != "obvious")

    def loss(batch):
        return train.step_losses(train._Step(config, by_role, total, batch, 1.0))["total"]

    loss = torch.compile(loss, fullgraph=True, **compiler) if kind == "compiled" else loss

    def step():
        batch = next(feed)
        if fill:
            with torch.no_grad():
                fill()
        with train.autocast(config.precision, device):
            value = loss(batch)
        value.backward()
        for gradients in own if fill else ():
            torch._foreach_add_([p.grad for p in gradients], [p.grad for p in filled])
        third.zero_grad()
        if kind not in ("plain", "floor"):
            return train.update(parameters, optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return step, pair


def several(config: RunConfig, device: torch.device, seeds: int) -> pd.DataFrame:
    """How long ways take to make a step of the pairs of several seeds."""
    steps = [begin("ours", config, device, seed)[0] for seed in range(seeds)]
    made = {"one pair after another": lambda: [step() for step in steps]}
    threads, spawn = max(1, torch.get_num_threads() // seeds), torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(seeds, spawn, torch.set_num_threads, (threads,)) as pool:
        if device.type == "cuda":
            streams = [torch.cuda.Stream(device) for _ in steps]
            made["a CUDA stream each"] = lambda: [*map(_step_in, streams, steps)]
        else:
            made["a process each, with its share of the cores"] = lambda: [*pool.map(_step_here, [config] * seeds)]
        seconds = in_turns(made)
    ratios = seconds.div(seconds["one pair after another"], axis=0).median()
    return pd.DataFrame({
        "Pairs at once": [f"{seeds}: {way}" for way in made],
        "ms for a step of each": [f"{1e3 * s:,.0f}" for s in seconds.median()],
        "× one after another": [f"{ratio:.2f}" for ratio in ratios],
    })  # fmt: skip


def _step_in(stream: torch.cuda.Stream, step: Callable) -> None:
    with torch.cuda.stream(stream):
        step()


def _step_here(config: RunConfig) -> None:
    _kept("ours", config, torch.device("cpu"))[0]()


_kept = functools.cache(begin)  # a process goes on with the pair that it has


_seconds = functools.partial(timeit.timeit, number=1, timer=benchmark.timer)  # a timer that waits for the device


def in_turns(steps: Mapping[str, Callable], seconds: float = _SECONDS) -> pd.DataFrame:
    """Seconds of each step (column) in each turn (row): three turns at least, more while less than ``seconds`` passed.

    A ratio of two ways is the median of the ratios turn by turn, so that a machine that slows down for a while doesn't
    show in it.
    """
    for step in steps.values():
        step()  # the first one, which is slow
    rows, started = [], benchmark.timer()
    while len(rows) < _LEAST_TURNS or (len(rows) < _MOST_TURNS and benchmark.timer() - started < seconds):
        order = random.Random(len(rows)).sample([*steps], len(steps))
        rows.append({name: _seconds(steps[name]) for name in order})
    return pd.DataFrame(rows, columns=[*steps])


def _start(way: str, config: RunConfig, device: torch.device) -> tuple[Callable, int]:
    """Begin and make a first step; a function that makes further ones, and the bytes that tensors took at most."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty
    with torch.profiler.profile(profile_memory=True) as profiler:
        step, _ = begin(way, config, device)
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return step, max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def work(config: RunConfig) -> float:
    """FLOP of a forward and a backward pass of one network on a batch."""
    with torch.device("meta"), flop_counter.FlopCounterMode(display=False) as counter:
        train.build(config)(torch.empty(2, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / 2 * config.batch_size


def is_too_slow(config: RunConfig, device: torch.device, rate: float) -> bool:
    """Whether a setting takes more than twice its time, were all its work matrix products at ``rate`` (FLOP/s)."""
    return (len(ways(device)) * (2 + _LEAST_TURNS) + 2 * _AHEAD) * 3 * work(config) / rate > 2 * _SECONDS


def step_rows(config: RunConfig, device: torch.device, rate: float) -> pd.DataFrame:
    """Measure every way: those on a fixed batch in turns, then those with batches, each for itself.

    Args:
        config: the setting, a joint run.
        device: where.
        rate: of large matrix products on this device, FLOP/s.

    Returns:
        a row a way: ``setting``, ``way``, the seconds of its ``turns``, ``ratio_to_floor`` and its
        ``ratio_quartiles``, ``label``; and, under their titles, the other columns that the table shows.
    """
    started = {way: _start(way, config, device) for way in ways(device)}
    steps = {way: step for way, (step, _) in started.items()}
    times = in_turns({way: step for way, step in steps.items() if not way.endswith("_fed")})
    for way in ("ours_fed", "obvious_fed"):  # a loader works ahead while others run: use that up first
        times[way] = [_seconds(steps[way]) for _ in range(_AHEAD + len(times))][_AHEAD:]
    ratios, quartiles = times.div(times["floor"], axis=0), times.quantile([0.25, 0.5, 0.75]).values
    done = [work(config) * (1 if way == "plain" else 3) / s for way, s in zip(steps, quartiles[1], strict=True)]
    return pd.DataFrame({
        "setting": f"{config.arch.upper()}, width {config.width:g}, batch {config.batch_size}",
        "way": [*steps],
        "turns": times.T.values.tolist(),
        "ratio_to_floor": ratios.median(),
        "ratio_quartiles": ratios.quantile([0.25, 0.75]).T.values.tolist(),
        "Width, batch": f"{config.width:g}, {config.batch_size}",
        "label": [WAYS[way] for way in steps],
        "ms (quartiles)": [f"{b:,.0f} ({a:,.0f}–{c:,.0f})" for a, b, c in 1e3 * quartiles.T],
        "Triplets/s": [f"{config.batch_size / s:,.0f}" for s in quartiles[1]],
        "× floor": [f"{ratio:.2f}" for ratio in ratios.median()],
        "% of peak": [f"{100 * d / rate:.0f}" for d in done],
        "MiB": [f"{peak / 2**20:,.0f}" for _, peak in started.values()],
    })  # fmt: skip


def evaluation(config: RunConfig, device: torch.device, images: int) -> pd.DataFrame:
    """How fast a sum is tested and recalibrated, beside a plain network."""
    shown = _noise("mnist", images, device).train_images
    few, test = models.normalize(shown[: max(2, images // 10)]), functools.partial(train.logits_of, images=shown)
    pair = [train.build(config, role).to(device).eval() for role in config.roles]
    total = WeightSum(pair).eval()
    with train.autocast(config.precision, device):
        batchnorm.recalibrate(total, few)
        seconds = in_turns({
            "a plain network is tested": lambda: test(pair[0], precision=config.precision),
            "a sum is tested": lambda: test(total.materialize().eval(), precision=config.precision),
            "a sum is recalibrated": lambda: batchnorm.recalibrate(total, few),
        }, seconds=0).median()  # fmt: skip
    rates = [f"{n / s:,.0f}" for n, s in zip((images, images, len(few)), seconds, strict=True)]
    return pd.DataFrame({"What": [*seconds.index], "Images a second": rates})


def between(steps: pd.DataFrame, way: str, over: str, digits: str) -> str:
    """From the lowest to the highest setting: how many times as long one way takes as another."""
    turns = steps.pivot(index="setting", columns="way", values="turns")
    ratios = [(pd.Series(a) / pd.Series(b)).median() for a, b in zip(turns[way], turns[over], strict=True)]
    return " to ".join(dict.fromkeys(format(ratio, digits) for ratio in (min(ratios), max(ratios))))


def measure(configs: Sequence[RunConfig], device: torch.device, images: int = 10_000, seeds: int = 2):
    """All tables.

    Args:
        configs: the settings, joint runs; all but the first are left out where they take more than twice their time.
        device: where.
        images: that the evaluation is timed on.
        seeds: that are trained at once, in the first setting.

    Returns:
        the rows of :func:`step_rows`, and results as the book reads them.
    """
    first, n = configs[0], 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, first.precision)) for _ in range(2))
    product = benchmark.Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    rate = 2 * n**3 / product.blocked_autorange().median
    slow = [config for config in configs[1:] if is_too_slow(config, device, rate)]
    left_out = "; ".join(f"width {config.width:g}, batch {config.batch_size}" for config in slow)
    steps = pd.concat([step_rows(config, device, rate) for config in configs if config not in slow])
    floor = between(steps, "ours", "floor", ".2f")
    obvious, fed = (between(steps, f"obvious{fed}", f"ours{fed}", ".1f") for fed in ("", "_fed"))
    values = {
        "device": _name(device),
        "precision": first.precision,
        "matmul_rate": f"{rate / 1e12:.2g} TFLOP/s",
        "network": first.arch.upper(),
        "versions": f"torch {torch.__version__}, Python {sys.version.split()[0]}, commit {store.commit()}",
        "left_out": f"Left out, since too slow here: {left_out}." if left_out else "",
        "finding": f"The three-term step takes {floor} times as long as its floor, three forward and backward passes "
        f"and two optimizer steps. The obvious way takes {obvious} times as long as the three-term step; each with "
        f"its batches, {fed} times.",
    }
    here = {"Device": values["device"], "Forward pass in": first.precision, "Three-term step / floor": floor}
    here |= {"Obvious way / three-term step": obvious, "Each with its batches": fed}
    found = {
        "steps": steps.loc[:, "Width, batch":].rename(columns={"label": "Step"}),
        "devices": pd.DataFrame([here | {"Matrix products": values["matmul_rate"]}]),
        "several": several(first, device, seeds),
        "evaluation": evaluation(first, device, images),
    }
    return steps, {"notebook": "bench", "values": values, "tables": {k: tables.as_json(f) for k, f in found.items()}}


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in about if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def write(steps: pd.DataFrame, content: dict, folder: Path, earlier: dict | None = None) -> Path:
    """Write ``bench.json`` and its figure; devices that an ``earlier`` measurement has, and this one not, are kept."""
    rows = content["tables"]["devices"]["rows"]
    rows += [row for row in (earlier or content)["tables"]["devices"]["rows"] if row[:2] != rows[0][:2]]
    store.write_json(folder / "bench.json", content)
    plots.use_style()
    plots.save(plots.speed(steps, content["values"]["device"]), folder / "bench.png")
    return folder / "bench.json"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: measure, print the tables, and write ``results/bench.json`` and ``bench.png``."""
    parser = argparse.ArgumentParser(prog="python -m weightsum_lib.bench", description=__doc__)
    parser.add_argument("--device", default="", help="cpu or cuda; by default a GPU where there is one")
    try:
        device = runs.pick_device(parser.parse_args(argv).device or "auto")
    except params.ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    method, precision = params.Method(protocol="joint", third="ce"), runs.pick_precision(device)
    config = RunConfig(method, "mnist", "cifar10", arch="vgg16", learning_rate=1e-3, precision=precision)
    settings = [replace(config, width=width, batch_size=size) for width in (0.25, 1.0) for size in (128, 512)]
    steps, content = measure(settings, device)
    folder = store.ROOT / params.read("quick").results_dir
    path = write(steps, content, folder, store.read_json(run.bench_files(folder / "quick")[0]))
    for name, table in content["tables"].items():
        print(f"\n{name}\n{pd.DataFrame(table['rows'], columns=table['columns']).to_string(index=False)}")
    print(f"\n{content['values']['finding']}\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
