"""``make bench``: the speed of the three-term step, beside one plain step, its floor, and other ways of doing it."""

import argparse
import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from weightsum_lib import cache, params, plots, results
from weightsum_lib.batchnorm import recalibrate
from weightsum_lib.data import Dataset
from weightsum_lib.models import normalize
from weightsum_lib.study import pick_device, pick_precision
from weightsum_lib.train import _MAX_GRADIENT, RunConfig, _Batches, _step_losses, autocast, build, count_correct
from weightsum_lib.weights import WeightSum

_TESTED_IMAGES = 10_000
_LABELS = {  # what a row is called in the report
    "plain": "one plain step of one network",
    "floor": "floor: three passes, two optimisers",
    "ours": "three-term step",
    "ours_fed": "three-term step and its batches",
    "functional": "`functional_call` on added weights",
    "static": "third module, filled by `_foreach_add`",
    "obvious": "the obvious way, float32",
    "obvious_fed": "the obvious way and its loader",
}


@dataclass(frozen=True)
class Setting:
    """What one table of steps is measured with; ``rounds`` is how often."""

    arch: str
    width: float
    batch_size: int
    device: torch.device
    precision: str
    rounds: int = 10
    dropout: float = 0.25

    @property
    def config(self) -> RunConfig:
        """A joint run of that size."""
        shared = {k: getattr(self, k) for k in ("arch", "width", "batch_size", "precision", "dropout")}
        return RunConfig("joint", "mnist", "cifar10", third="ce", learning_rate=1e-3, weight_decay=5e-4, **shared)


class Bench:
    """Ways to make one step on a pair of networks, each on networks and an optimizer of its own.

    A way's method builds them and returns a function that makes one step, and the networks.
    """

    def __init__(self, setting: Setting):
        self.setting, self.config, self.device = setting, setting.config, setting.device
        self.data = {
            name: _random_dataset(name, 20 * setting.batch_size).to(self.device) for name in self.config.roles.values()
        }

    def _networks(self, *roles: str) -> list[nn.Module]:
        return [build(self.config, role).to(self.device).train() for role in roles]

    def _optimizer(self, networks: Sequence[nn.Module]) -> torch.optim.SGD:
        parameters = [p for network in networks for p in network.parameters()]
        c = self.config
        return torch.optim.SGD(
            parameters, lr=c.learning_rate, momentum=0.9, nesterov=True, weight_decay=c.weight_decay, fused=True
        )

    def batches(self) -> Iterator[dict]:
        """The batches of training, without end: (x, y) by role."""
        loaders = {r: _Batches(self.config, r, self.data[n], 20) for r, n in self.config.roles.items()}
        epoch = 0
        while True:
            for batches in zip(*(loader.epoch(epoch) for loader in loaders.values()), strict=True):
                yield dict(zip(loaders, batches, strict=True))
            epoch += 1

    def _loss(self, *terms: tuple[Callable, tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of the cross-entropies of (network, batch) pairs."""
        with autocast(self.config.precision, self.device):
            return sum(F.cross_entropy(network(x).float(), y) for network, (x, y) in terms)

    def plain(self):
        """Forward, backward and optimizer of one network."""
        networks = self._networks("main")
        optimizer, batch = self._optimizer(networks), next(self.batches())["main"]

        def step():
            self._loss((networks[0], batch)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step, networks

    def floor(self):
        """Three forward and backward passes and the optimizer steps of two networks, nothing else."""
        *networks, third = self._networks("main", "support", "main")
        optimizer, batch = self._optimizer(networks), next(self.batches())

        def step():
            terms = zip((*networks, third), (batch["main"], batch["support"], batch["main"]), strict=True)
            self._loss(*terms).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            third.zero_grad(set_to_none=True)

        return step, networks

    def ours(self, fed: bool = False):
        """The step of :func:`weightsum_lib.train.train`; ``fed``: on a new batch each time."""
        networks = self._networks(*self.config.roles)
        total, optimizer = WeightSum(networks), self._optimizer(networks)
        by_role = dict(zip(self.config.roles, networks, strict=True))
        batches = self.batches()
        batch = next(batches)

        def step():
            with autocast(self.config.precision, self.device):
                losses = _step_losses(self.config, by_role, total, next(batches) if fed else batch, 1.0)
            losses["total"].backward()
            _update(networks, optimizer)

        return step, networks

    def ours_fed(self):
        """The step of training and the making of its batches."""
        return self.ours(fed=True)

    def functional(self):
        """``torch.func.functional_call`` on the added weights, written out."""
        networks = self._networks("main", "support")
        body, optimizer, batch = self._networks("main")[0], self._optimizer(networks), next(self.batches())

        def step():
            pairs = zip(*(n.named_parameters() for n in networks), strict=True)
            weights = {name: p + q for (name, p), (_, q) in pairs}
            loss = self._loss(
                (networks[0], batch["main"]),
                (networks[1], batch["support"]),
                (lambda x: functional_call(body, weights, (x,)), batch["main"]),
            )
            loss.backward()
            _update(networks, optimizer)

        return step, networks

    def static(self):
        """A third module that is filled in place, and whose gradients are added to both networks'."""
        networks = self._networks("main", "support")
        total, optimizer, batch = self._networks("main")[0], self._optimizer(networks), next(self.batches())
        first, second, third = ([*n.parameters()] for n in (*networks, total))

        def step():
            with torch.no_grad():
                torch._foreach_copy_(third, first)
                torch._foreach_add_(third, second)
            loss = self._loss((networks[0], batch["main"]), (networks[1], batch["support"]), (total, batch["main"]))
            loss.backward()
            for parameters in (first, second):
                torch._foreach_add_([p.grad for p in parameters], [p.grad for p in third])
            _update(networks, optimizer)
            total.zero_grad(set_to_none=True)

        return step, networks

    def obvious(self, fed: bool = False):
        """Correct but plain: float32, ``load_state_dict`` each step, gradients added one by one.

        ``fed``: on a new batch of a DataLoader with torchvision's transforms each time.
        """
        networks = [n.to(memory_format=torch.contiguous_format) for n in self._networks("main", "support")]
        (total,) = self._networks("main")
        total.to(memory_format=torch.contiguous_format)
        c, parameters = self.config, [p for n in networks for p in n.parameters()]
        optimizer = torch.optim.SGD(
            parameters, lr=c.learning_rate, momentum=0.9, nesterov=True, weight_decay=c.weight_decay
        )
        fixed = next(self.batches())
        feeds = [_loader(self.data[name], c.batch_size) for name in self.data] if fed else []

        def step():
            batches = [[t.to(self.device) for t in next(f)] for f in feeds] or [fixed["main"], fixed["support"]]
            states = [dict(n.named_parameters()) for n in networks]
            total.load_state_dict({k: states[0][k] + states[1][k] for k in states[0]}, strict=False)
            terms = zip((*networks, total), (*batches, batches[0]), strict=True)
            sum(F.cross_entropy(network(x), y) for network, (x, y) in terms).backward()
            for p, q, r in zip(*(m.parameters() for m in (*networks, total)), strict=True):
                p.grad += r.grad
                q.grad += r.grad
            _update(networks, optimizer)
            total.zero_grad()

        return step, networks

    def obvious_fed(self):
        """The obvious way with its loader."""
        return self.obvious(fed=True)

    def rows(self) -> list[dict]:
        """Measure every way: those on a fixed batch in turns, those with a loader each for itself."""
        steps, memory, flops = {}, {}, {}
        for name in _LABELS:
            base = _memory_now(self.device)
            step, _ = getattr(self, name)()
            step()
            with FlopCounterMode(display=False) as counter:
                step()
            steps[name], memory[name] = step, _memory_peak(self.device) - base
            flops[name] = counter.get_total_flops()
        fed = [name for name in steps if name.endswith("_fed")]
        seconds = {name: [] for name in steps}
        for turn in range(self.setting.rounds):
            order = [name for name in steps if name not in fed]
            random.Random(turn).shuffle(order)
            for name in order:
                seconds[name].append(_seconds(steps[name], self.device))
        for name in fed:  # a loader works ahead while others run: use that up first
            times = [_seconds(steps[name], self.device) for _ in range(8 + self.setting.rounds)]
            seconds[name] = times[8:]
        floor = statistics.median(seconds["floor"])
        return [
            {
                "way": name,
                "seconds": statistics.median(times),
                "quartiles": np.quantile(times, [0.25, 0.75]).tolist(),
                "steps": len(times),
                "triplets_per_second": self.config.batch_size / statistics.median(times),
                "ratio_to_floor": statistics.median(times) / floor,
                "flops_per_second": flops[name] / statistics.median(times),
                "peak_bytes": memory[name],
            }
            for name, times in seconds.items()
        ]


def _update(networks: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """What follows the backward pass in training."""
    nn.utils.clip_grad_norm_([p for n in networks for p in n.parameters()], _MAX_GRADIENT)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _random_dataset(name: str, images: int) -> Dataset:
    """Images of noise, which cost what others cost."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, n in (("train", images), ("val", 1), ("test", 1)):
        tensors[f"{split}_images"] = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
        tensors[f"{split}_labels"] = torch.randint(0, 10, (n,), generator=generator)
    return Dataset(name=name, source="stand-in", note="noise", checksum="", **tensors)


class _Pictures(torch.utils.data.Dataset):
    """A dataset as torchvision's are: PIL images through transforms, one by one."""

    def __init__(self, dataset: Dataset):
        self.images = dataset.train_images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.labels = dataset.train_labels.tolist()
        flip = [transforms.RandomHorizontalFlip()] if dataset.name == "cifar10" else []
        steps = [transforms.RandomCrop(32, padding=2), *flip, transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.25] * 3)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def _loader(dataset: Dataset, batch_size: int) -> Iterator:
    """Batches of a DataLoader without end; two workers, of which it has two batches each ahead."""
    loader = DataLoader(
        _Pictures(dataset), batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    while True:
        yield from loader


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
    data = _random_dataset("mnist", images).to(device)
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
    """What is measured on a device: on a CPU what two minutes or three allow."""
    quarter = Setting("vgg16", 0.25, 128, device, precision)
    if device.type == "cuda":
        sizes = [(w, b) for w in (0.25, 1.0) for b in (128, 512)]
        return [replace(quarter, width=w, batch_size=b, rounds=20) for w, b in sizes]
    return [
        replace(quarter, rounds=12),
        replace(quarter, batch_size=512, rounds=5),
        replace(quarter, width=1.0, rounds=3),
    ]


def measure(chosen: Sequence[Setting], images: int = _TESTED_IMAGES) -> dict:
    """All tables, as results that the report can read."""
    device, precision = chosen[0].device, chosen[0].precision
    rate = matmul_rate(device, precision)
    steps = []
    for setting in chosen:
        name = f"{setting.arch.upper()}, width {setting.width:g}, batch {setting.batch_size}"
        print(f"{name} …", flush=True)
        steps += [
            {
                "setting": name,
                "width": setting.width,
                "batch_size": setting.batch_size,
                **row,
                "share": row["flops_per_second"] / rate,
                "label": _LABELS[row["way"]],
            }
            for row in Bench(setting).rows()
        ]
        gc.collect()
    tested = evaluation_rows(chosen[0], images)
    layouts = layout_rows(device, precision)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "notebook": "bench",
        "steps": steps,
        "values": {
            "finding": finding(steps),
            "device": gpu or f"CPU, {torch.get_num_threads()} threads",
            "precision": precision,
            "network": chosen[0].arch.upper(),
            "matmul_rate": f"{rate / 1e12:.2g} TFLOP/s",
            "versions": f"torch {torch.__version__}, Python {sys.version.split()[0]}",
        },
        "tables": {
            "steps": results.as_json_table(pd.DataFrame(map(_as_shown, steps))),
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


def finding(steps: Sequence[dict]) -> str:
    """What the table of steps says, in one sentence."""
    seconds = {(row["setting"], row["way"]): row["seconds"] for row in steps}
    every = list(dict.fromkeys(row["setting"] for row in steps))

    def times(way, over, form=".1f"):
        ratios = sorted(seconds[s, way] / seconds[s, over] for s in every)
        low, high = format(ratios[0], form), format(ratios[-1], form)
        return low if low == high else f"{low} to {high}"

    return (
        f"The three-term step takes {times('ours', 'floor', '.2f')} times as long as its floor, three forward and "
        f"backward passes and two optimizer steps. The obvious way takes {times('obvious', 'ours')} times as "
        f"long as the three-term step; each with its batches, {times('obvious_fed', 'ours_fed')} times."
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
    path = write(content, cache.PACKAGE.parent / params.read("quick").results_dir)
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
