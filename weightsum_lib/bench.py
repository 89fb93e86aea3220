"""``make bench``: the speed of the three-term step, beside one plain step, its floor, and other ways of doing it."""

import functools
import itertools
import random
import sys
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.utils import benchmark
from torch.utils.data import DataLoader, default_collate

from weightsum_lib import run, scale
from weightsum_lib.core.weights import WeightSum
from weightsum_lib.report import plots
from weightsum_lib.report.tables import Interval, as_json, span
from weightsum_lib.study import data, params, runs, store, train
from weightsum_lib.study.config import RunConfig, pick_device, pick_precision

_SECONDS = 25.0  # in about which the ways of a setting are timed, three times at least
_AHEAD = 6  # steps after which a loader has no more ready than it will have
WAYS = {  # of making a step, and what the report calls each; "_fed": on a new batch each time
    "plain": "one plain step of one network",
    "floor": "floor: three passes, two optimizers",
    "ours": "three-term step",
    "in_place": "third module, filled in place",
    "obvious": "the obvious way, float32",
    "ours_fed": "three-term step and its batches",
    "obvious_fed": "the obvious way and its loader",
}


def _noise(name: str, images: int, device: torch.device) -> data.Dataset:
    """Images of noise, which cost what others cost."""
    x = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(images) % 10
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


def begin(way: str, config: RunConfig, device: torch.device) -> tuple[Callable, list]:
    """Start to make steps in one of the :data:`WAYS`, on networks of its own.

    Args:
        way: its name.
        config: of a joint run whose third term is ``ce``.
        device: where.

    Returns:
        a function that makes one step, and the two networks.
    """
    kind = way.removesuffix("_fed")
    roles = ("main", "support", "main")  # a third network of the same architecture, for the ways that want one
    networks = [train.build(config, role).to(device).train() for role in roles]
    if kind == "obvious":
        config = replace(config, precision="float32")
        networks = [network.to(memory_format=torch.contiguous_format) for network in networks]
    *pair, third = networks
    *own, filled = [[*network.parameters()] for network in networks]
    parameters, by_role = [*own[0], *own[1]], dict(zip(config.roles, pair, strict=True))
    feed = _batches(config, device, loaders=way == "obvious_fed")
    feed = feed if way.endswith("_fed") else itertools.repeat(next(feed))
    optimizer = train.optimizer_of(config, parameters, fused=kind != "obvious")
    total = {"plain": None, "floor": third, "in_place": third, "obvious": third}.get(kind, WeightSum(pair))

    @torch.no_grad()
    def fill():
        if kind == "in_place":
            torch._foreach_copy_(filled, own[0])
            torch._foreach_add_(filled, own[1])
        else:
            named = zip(third.named_parameters(), *own, strict=True)
            third.load_state_dict({name: p + q for (name, _), p, q in named}, strict=False)

    def step():
        batch, fills = next(feed), kind in ("in_place", "obvious")
        if fills:
            fill()
        with train.autocast(config.precision, device):
            losses = train.step_losses(train._Step(config, by_role, total, batch, 1.0))
        losses["total"].backward()
        for gradients in own if fills else ():
            torch._foreach_add_([p.grad for p in gradients], [p.grad for p in filled])
        third.zero_grad()
        if kind not in ("plain", "floor"):
            return train.update(parameters, optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return step, pair


_seconds = functools.partial(timeit.timeit, number=1, timer=benchmark.timer)  # a timer that waits for the device


def in_turns(steps: Mapping[str, Callable], seconds: float | None = None) -> pd.DataFrame:
    """Seconds of each step (column) in each turn (row): three turns at least, up to 20 while there are ``seconds``.

    A ratio of two ways is the median of the ratios turn by turn, so that a machine that slows down for a while doesn't
    show in it.
    """
    for step in steps.values():
        step()  # the first one, which is slow
    rows, left = [], _SECONDS if seconds is None else seconds
    while len(rows) < 3 or (len(rows) < 20 and left > 0):
        rows.append({name: _seconds(steps[name]) for name in random.Random(len(rows)).sample([*steps], len(steps))})
        left -= sum(rows[-1].values())
    return pd.DataFrame(rows, columns=[*steps])


def work(config: RunConfig) -> float:
    """FLOP of a three-term step: three forward and backward passes on a batch."""
    return runs.work(config) / (config.trained_epochs * config.epoch_images) * config.batch_size


def _quartiles(values: pd.Series) -> Interval:
    """The median of some turns, and between which values half of them lie."""
    return Interval(*values.quantile([0.5, 0.25, 0.75]), len(values))


def step_rows(config: RunConfig, device: torch.device, rate: float) -> pd.DataFrame:
    """Measure every way: those on a fixed batch in turns, then those with batches, each for itself.

    Args:
        config: the setting, a joint run.
        device: where.
        rate: of large matrix products on this device, FLOP/s.

    Returns:
        a row a way: ``setting``, ``way``, the seconds of its ``turns``, ``ratio_to_floor`` with its quartiles,
        ``label``; and, under their titles, the other columns that the table shows.
    """
    steps = {way: begin(way, config, device)[0] for way in WAYS}
    times = in_turns({way: step for way, step in steps.items() if not way.endswith("_fed")})
    for way in ("ours_fed", "obvious_fed"):  # a loader works ahead while others run: use that up first
        times[way] = [_seconds(steps[way]) for _ in range(_AHEAD + len(times))][_AHEAD:]
    ratios, medians = [_quartiles(times[way] / times["floor"]) for way in times], times.median()
    passes = 1 - (times.columns == "plain") * 2 / 3
    return pd.DataFrame({
        "setting": f"{config.arch.upper()}, width {config.width:g}, batch {config.batch_size}",
        "way": [*times],
        "turns": times.T.values.tolist(),
        "ratio_to_floor": ratios,
        "Width, batch": f"{config.width:g}, {config.batch_size}",
        "label": [WAYS[way] for way in times],
        "ms (quartiles)": [f"{_quartiles(1e3 * times[way]):,.0f}" for way in times],
        "Triplets/s": (config.batch_size / medians).map("{:,.0f}".format),
        "× floor": [f"{ratio.mean:.2f}" for ratio in ratios],
        "% of peak": (100 * work(config) * passes / medians / rate).map("{:.0f}".format),
    })  # fmt: skip


def between(steps: pd.DataFrame, way: str, over: str, digits: str) -> str:
    """From the lowest to the highest setting: how many times as long one way takes as another."""
    turns = steps.pivot(index="setting", columns="way", values="turns")
    return span([(pd.Series(a) / b).median() for a, b in zip(turns[way], turns[over], strict=True)], digits)


def measure(configs: Sequence[RunConfig], device: torch.device) -> tuple[pd.DataFrame, dict]:
    """All tables.

    Args:
        configs: the settings, joint runs.
        device: where.

    Returns:
        the rows of :func:`step_rows`, and results as the book reads them.
    """
    first, n = configs[0], 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, first.precision)) for _ in range(2))
    rate = 2 * n**3 / in_turns({"a @ b": lambda: a @ b}, seconds=1)["a @ b"].median()
    steps = pd.concat([step_rows(config, device, rate) for config in configs])
    floor = between(steps, "ours", "floor", ".2f")
    obvious, fed = (between(steps, f"obvious{fed}", f"ours{fed}", ".1f") for fed in ("", "_fed"))
    values = {
        "device": _name(device),
        "precision": first.precision,
        "matmul_rate": f"{rate / 1e12:.3g} TFLOP/s",
        "network": first.arch.upper(),
        "versions": f"torch {torch.__version__}, Python {sys.version.split()[0]}, commit {store.commit()}",
        "finding": f"The three-term step takes {floor} times as long as its floor, three forward and backward passes "
        f"and two optimizer steps. The obvious way takes {obvious} times as long as the three-term step; each with "
        f"its batches, {fed} times.",
    }
    here = {"Device": values["device"], "Forward pass in": first.precision, "Three-term step / floor": floor}
    here |= {"Obvious way / three-term step": obvious, "Each with its batches": fed}
    found = {
        "steps": steps.loc[:, "Width, batch":].rename(columns={"label": "Step"}),
        "devices": pd.DataFrame([here | {"Matrix products": values["matmul_rate"]}]),
    }
    return steps, {"notebook": "bench", "values": values, "tables": {k: as_json(frame) for k, frame in found.items()}}


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in about if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def write(steps: pd.DataFrame, content: dict, folder: Path, earlier: dict | None = None) -> None:
    """Write ``bench.json`` and its figure; devices that an ``earlier`` measurement has, and this one not, are kept."""
    rows = content["tables"]["devices"]["rows"]
    rows += [row for row in (earlier or content)["tables"]["devices"]["rows"] if row[:2] != rows[0][:2]]
    store.write_json(folder / "bench.json", content)
    plots.use_style()
    plots.save(plots.speed(steps, content["values"]["device"]), folder / "bench.png")


def main(device: str) -> None:
    """Measure, print the tables, write ``bench.json``, ``bench.png`` and ``scale.json`` in the folder of results.

    Args:
        device: cpu, cuda, or auto: a GPU where there is one.

    Raises:
        ParamsError: it is not there.
    """
    device = pick_device(device)
    method, precision = params.Method(protocol="joint", third="ce"), pick_precision(device)
    config = RunConfig(method, "mnist", "cifar10", arch="vgg16", learning_rate=1e-3, precision=precision)
    widths = (0.25, 1.0) if device.type == "cuda" else (0.25,)  # a CPU is busy for minutes with the full width
    settings = [replace(config, width=width, batch_size=size) for width in widths for size in (128, 512)]
    steps, content = measure(settings, device)
    folder = store.ROOT / params.read("quick").results_dir
    write(steps, content, folder, store.read_json(run.standing(folder / "quick")["bench.json"]))
    larger = scale.cluster(device.type)
    store.write_json(folder / "scale.json", larger)
    for name, table in (content["tables"] | larger["tables"]).items():
        print(f"\n{name}\n{pd.DataFrame(table['rows'], columns=table['columns']).to_string(index=False)}")
    print(f"\n{content['values']['finding']}\n{folder}")
