"""One training run: a function of a frozen configuration, its datasets, and the weights it starts from."""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib import cache
from weightsum_lib.batchnorm import recalibrate
from weightsum_lib.keys import Key, compact, deal, draw, hidden_sizes
from weightsum_lib.losses import three_term_loss
from weightsum_lib.models import ARCHITECTURES, memory_format, normalize
from weightsum_lib.weights import WeightSum

_SHIFT = 2  # pixels by which a training image is moved at most
_FLIPPED = ("cifar10",)  # digits are never mirrored
_MAX_GRADIENT = 5.0  # L2 norm to which the gradient is clipped: early steps of a sum can be wild
_CALIBRATION = 500  # training images that set the batch-norm statistics of a sum before it is validated
_WARMUP = 0.2  # share of the steps in which the learning rate grows


@dataclass(frozen=True)
class RunConfig:
    """All that a run depends on besides its datasets and the code.

    ``protocol`` is "independent" (one network on ``main``), "joint" (a pair, with the third term on its
    sum) or "sequential" (fine-tuning on ``main`` from ``start``: "sum" of two independent networks,
    "main" alone, or "random" weights). An independent network may also ``start`` "shared": at the weights
    at which every such network of its seed starts. The switches are those of
    :class:`weightsum_lib.params.Method`. ``width`` is that of the sum; under a key a network has the share
    ``key_share`` of it.
    """

    protocol: str
    main: str
    support: str = ""
    seed: int = 0
    arch: str = "vgg8"
    width: float = 1.0
    dropout: float = 0.25
    epoch_images: int = 50_000
    epochs: int = 1
    finetune_epochs: int = 0
    batch_size: int = 128
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    third: str = "none"
    third_weight: float = 1.0
    third_ramp: float = 0.0
    symmetric: bool = False
    symmetric_to: str = "both"
    label_smoothing: float = 0.0
    equal_norms: bool = False
    keys: str = "none"
    key_share: float = 1.0
    permuted_support: float = 0.0
    permuted_ramp: float = 0.0
    owner_statistics: bool = False
    centered_scale: bool = False
    quiet: float = 0.0
    start: str = "random"
    precision: str = "float32"

    @property
    def roles(self) -> dict[str, str]:
        """The datasets of the networks that this run trains, by role."""
        return {"main": self.main, "support": self.support} if self.protocol == "joint" else {"main": self.main}

    @property
    def trained_epochs(self) -> int:
        """Epochs that this run itself trains."""
        return self.finetune_epochs if self.protocol == "sequential" else self.epochs

    @property
    def passes(self) -> int:
        """Forward and backward passes of a network in one step, a measure of the work."""
        return 3 + self.symmetric if self.protocol == "joint" else 1

    def describe(self) -> str:
        """A short name for a line on the terminal."""
        how = f"{self.protocol} {self.third}" if self.protocol == "joint" else self.protocol
        how += f" from {self.start}" if self.start != "random" or self.protocol == "sequential" else ""
        how += f" {self.keys} keys {self.key_share:g}" if self.keys != "none" else ""
        how += " symmetric" if self.symmetric else ""
        how += " permuted" if self.permuted_support else ""
        tasks = "+".join(self.roles.values())
        return f"{how} {tasks} seed {self.seed}"

    def stream(self, role: str, purpose: str) -> int:
        """The seed of one random stream: no two networks share one unless they are the same network.

        A support network has streams of its own for each main task, so that the main networks of two
        pairs never meet through it.
        """
        owner = {
            "independent": f"{self.main} alone",
            "joint": f"{self.main} with support" if role == "main" else f"{self.support} as support of {self.main}",
            "sequential": f"{self.main} fine-tuned from {self.start}",
        }[self.protocol]
        if self.start == "shared" and purpose == "initialization":
            owner = "shared start"
        text = f"{self.seed}/{owner}/{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@dataclass
class Run:
    """A finished run: its networks by role ("main", "support") in evaluation mode, and a row for each epoch."""

    config: RunConfig
    networks: dict[str, nn.Module]
    history: list[dict]


def build(config: RunConfig, role: str = "main") -> nn.Module:
    """The untrained network of a run, its weights drawn from its own stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.stream(role, "initialization"))
        network = ARCHITECTURES[config.arch](
            width=config.width * config.key_share, dropout=config.dropout, centered_scale=config.centered_scale
        )
    return network.to(memory_format=memory_format(hidden_sizes(network).values()))


def key_sizes(config: RunConfig) -> tuple[dict[str, int], dict[str, int]]:
    """The hidden sizes of a run's networks, and those of the wide network in which they are summed."""
    with torch.device("meta"):
        widths = (config.width * config.key_share, config.width)
        small, wide = (hidden_sizes(ARCHITECTURES[config.arch](width=w)) for w in widths)
    return small, wide


def key_of(config: RunConfig, role: str, block: int) -> Key | None:
    """The key of one network of a run: None, its own draw, or the dealt ``block`` of disjoint keys."""
    if config.keys == "none":
        return None
    if config.keys == "disjoint":
        return deal(*key_sizes(config), block)
    return draw(*key_sizes(config), torch.Generator().manual_seed(config.stream(role, "key")))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The forward pass's precision: "float32", or "bfloat16" with float32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def augment(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Shift each image by up to two pixels each way (black comes in) and, if ``flip``, mirror every other at random.

    Args:
        images: uint8 (N, 3, 32, 32), on the generator's device.
        generator: the stream that is drawn from.
        flip: whether mirrored images keep their label.

    Returns:
        uint8 (N, 3, 32, 32).
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (_SHIFT,) * 4)
    draw = torch.randint(0, 2 * _SHIFT + 1, (2, n, 1), generator=generator, device=images.device)
    rows = draw[0] + torch.arange(height, device=images.device)
    columns = draw[1] + torch.arange(width, device=images.device)
    if flip:
        mirrored = torch.rand((n, 1), generator=generator, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class _Batches:
    """Shuffled, augmented batches of one task without end: epoch e depends on the stream and e only."""

    def __init__(self, config: RunConfig, role: str, dataset, steps: int):
        self.config, self.role, self.dataset, self.steps = config, role, dataset, steps
        self.flip = dataset.name.split(" ")[0] in _FLIPPED

    def epoch(self, epoch: int):
        """Yield the epoch's ``steps`` batches: network input (N, 3, 32, 32) and labels (N,)."""
        images, labels = self.dataset.train_images, self.dataset.train_labels
        generator = torch.Generator(images.device)
        generator.manual_seed(self.config.stream(self.role, f"order of epoch {epoch}"))
        wanted, order = self.steps * self.config.batch_size, []
        while sum(map(len, order)) < wanted:
            order.append(torch.randperm(len(labels), generator=generator, device=images.device))
        for index in torch.cat(order)[:wanted].split(self.config.batch_size):
            yield normalize(augment(images[index], generator, self.flip)), labels[index]


def _learning_rate(config: RunConfig, progress: float) -> float:
    """Linear warm-up, then a half cosine to zero; ``progress`` runs from 0 to 1."""
    if progress < _WARMUP:
        return config.learning_rate * progress / _WARMUP
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))


def _third_weight(config: RunConfig, progress: float) -> float:
    """The third term's factor: grows linearly in the first ``third_ramp`` of the steps."""
    return config.third_weight * min(1.0, progress / config.third_ramp if config.third_ramp else 1.0)


def _with_own_statistics(network: nn.Module, x: Tensor) -> Tensor:
    """The output of a network in training whose batch norm uses the running statistics, as it will after training."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.eval()
    try:
        return network(x).float()
    finally:
        for norm in norms:
            norm.train()


def _uniformity(logits: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution, less its minimum (nats): how loudly a network answers."""
    return -logits.log_softmax(-1).mean() - math.log(logits.shape[-1])


def _step_losses(config, networks, total, batches, progress) -> dict[str, Tensor]:
    """One step's named losses; ``batches`` holds (x, y) by role, ``total`` is the sum or None."""
    x, y = batches["main"]
    logits = networks["main"](x).float()
    if total is None:
        loss = torch.nn.functional.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
        return {"total": loss, "main": loss}
    x_support, y_support = batches["support"]
    logits_support = networks["support"](x_support).float()
    weight, held = _third_weight(config, progress), [1] if config.symmetric_to == "main" else []
    logits_sum_support, quiet = None, 0.0
    if config.owner_statistics or config.quiet:
        by_support = _with_own_statistics(networks["support"], x)
        by_main = _with_own_statistics(networks["main"], x_support)
        quiet = config.quiet * (_uniformity(by_support) + _uniformity(by_main))
    if config.owner_statistics:  # the keys are disjoint, so that the sum of the weights adds the logits
        logits_sum = logits + by_support
        logits_sum_support = (logits_support.detach() if held else logits_support) + by_main
    else:
        logits_sum = total(x).float()
        if config.symmetric:
            logits_sum_support = total(x_support, held).float()
    terms = three_term_loss(
        logits,
        y,
        logits_support,
        y_support,
        logits_sum,
        third=config.third,
        weight=weight,
        logits_sum_support=logits_sum_support if config.symmetric else None,
        label_smoothing=config.label_smoothing,
    )
    return terms._asdict() | {"total": terms.total + weight * quiet}


class _Keys:
    """Where the two networks of a pair lie in their sum, step by step."""

    def __init__(self, config: RunConfig):
        self.config = config
        if config.keys == "none":
            small, wide = key_sizes(config)
            self.own = [deal(small, wide, 0)] * 2
        else:
            self.own = [key_of(config, role, block) for block, role in enumerate(config.roles)]

    def epoch(self, epoch: int, steps: int):
        """Yield each step's keys, or None for those of the step before."""
        config, sizes = self.config, key_sizes(self.config)
        generator = torch.Generator().manual_seed(config.stream("support", f"permutations of epoch {epoch}"))
        own = compact(self.own)
        for step in range(steps):
            progress = (epoch * steps + step) / (config.epochs * steps)
            share = config.permuted_support * min(1.0, progress / config.permuted_ramp if config.permuted_ramp else 1.0)
            permuted = torch.rand((), generator=generator) < share
            yield compact([self.own[0], draw(*sizes, generator)]) if permuted else own


@torch.no_grad()
def _equalize_norms(networks: Mapping[str, nn.Module]) -> None:
    """Scale each layer's weights of both networks to the mean of their norms."""
    for layer in zip(*(n.modules() for n in networks.values()), strict=True):
        if isinstance(layer[0], nn.Conv2d | nn.Linear):
            norms = [module.weight.norm() for module in layer]
            for module, norm in zip(layer, norms, strict=True):
                module.weight *= sum(norms) / len(norms) / norm


@torch.no_grad()
def count_correct(network: nn.Module, images: Tensor, labels: Tensor, precision: str, batch: int | None = None) -> int:
    """Images that a network in evaluation mode puts into the right class.

    Args:
        network: in evaluation mode.
        images: uint8 (N, 3, 32, 32).
        labels: (N,) integers.
        precision: see :func:`autocast`.
        batch: images at a time; by default on a CPU few, so that what lies between two layers fits into its cache.
    """
    batch = batch or (100 if images.device.type == "cpu" else 500)
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    with autocast(precision, images.device):
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            correct += (network(normalize(x)).argmax(1) == y).sum()
    return correct.item()


def train(
    config: RunConfig,
    datasets: Mapping,
    *,
    start: Sequence[nn.Module] = (),
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict], None] = lambda row: None,
) -> Run:
    """Train the networks of one configuration.

    Args:
        config: what to train.
        datasets: name to :class:`~weightsum_lib.data.Dataset`, on the device to train on.
        start: for ``sequential`` runs that don't start at random: the network to fine-tune, or the
            networks whose sum is fine-tuned (a sum starts without batch-norm statistics).
        checkpoint: file that keeps the state after each epoch, so that a killed run goes on from there
            with the same numbers; removed when the run ends.
        on_epoch: called with each epoch's row: ``epoch`` (from 1), mean training losses
            ``loss_main``, ``loss_support``, ``loss_third`` (nats), validation accuracies
            ``val_main``, ``val_support``, ``val_sum``, and where the third term is symmetric
            ``val_sum_support`` (the sum on the support task; percent), ``seconds``.

    Raises:
        FloatingPointError: the loss is no longer finite; says in which epoch.
    """
    device = datasets[config.main].train_images.device
    networks = {role: build(config, role).to(device) for role in config.roles}
    if start:
        origin = WeightSum(start).materialize() if len(start) > 1 else start[0]
        networks["main"].load_state_dict(origin.state_dict())
    keyed = config.keys != "none" or config.permuted_support > 0
    keys, total = _Keys(config) if keyed else None, None
    if config.protocol == "joint":
        total = WeightSum(list(networks.values()), keys=compact(keys.own) if keyed else None)
    parameters = [p for network in networks.values() for p in network.parameters()]
    optimizer = torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=0.9, nesterov=True, weight_decay=config.weight_decay, fused=True
    )
    steps = config.epoch_images // config.batch_size
    loaders = {role: _Batches(config, role, datasets[name], steps) for role, name in config.roles.items()}
    history = _restore(checkpoint, networks, parameters, optimizer, config)
    for epoch in range(len(history), config.trained_epochs):
        started = time.perf_counter()
        for network in networks.values():
            network.train()
        places = keys.epoch(epoch, steps) if config.permuted_support else itertools.repeat(None, steps)
        sums: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.stream("main", f"dropout of epoch {epoch}"))
            epoch_batches = zip(*(loader.epoch(epoch) for loader in loaders.values()), strict=True)
            for step, (batches, place) in enumerate(zip(epoch_batches, places, strict=True)):
                if place:
                    total.use_keys(place)
                progress = (epoch * steps + step) / (config.trained_epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = _learning_rate(config, progress)
                with autocast(config.precision, device):
                    losses = _step_losses(config, networks, total, dict(zip(loaders, batches, strict=True)), progress)
                losses["total"].backward()
                nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if config.equal_norms:
                    _equalize_norms(networks)
                for name, loss in losses.items():  # read once an epoch: no waiting for the device in between
                    sums[name] = sums.get(name, 0) + loss.detach()
        row = {"epoch": epoch + 1}
        row |= {f"loss_{name}": (value / steps).item() for name, value in sums.items() if name != "total"}
        if not math.isfinite((sums["total"] / steps).item()):
            raise FloatingPointError(
                f"{config.describe()}: the loss is not finite in epoch {epoch + 1}; "
                f"lower learning_rate (now {config.learning_rate}) or raise third_ramp (now {config.third_ramp})"
            )
        for role, network in networks.items():
            row[f"val_{role}"] = _validate(network.eval(), datasets[config.roles[role]], config.precision)
        if total:
            if keyed:
                total.use_keys(compact(keys.own))
            for role in list(networks)[: 1 + config.symmetric]:
                dataset = datasets[config.roles[role]]
                with autocast(config.precision, device):
                    if config.owner_statistics:
                        total.add_statistics()
                    else:
                        recalibrate(total, normalize(dataset.train_images[:_CALIBRATION]))
                row["val_sum" if role == "main" else "val_sum_support"] = _validate(
                    total.materialize().eval(), dataset, config.precision
                )
        row["seconds"] = time.perf_counter() - started
        history.append(row)
        _save(checkpoint, networks, parameters, optimizer, history)
        on_epoch(row)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    for network in networks.values():
        network.eval()
    return Run(config, networks, history)


def _validate(network: nn.Module, dataset, precision: str) -> float:
    """Percent of the validation images."""
    correct = count_correct(network, dataset.val_images, dataset.val_labels, precision)
    return 100 * correct / len(dataset.val_labels)


def _buffers(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What training changes besides the parameters: batch-norm statistics."""
    return {f"buffer.{role}.{name}": b for role, n in networks.items() for name, b in n.named_buffers()}


def _save(checkpoint, networks, parameters, optimizer, history) -> None:
    if checkpoint is None:
        return
    tensors = {name: b.clone().contiguous() for name, b in _buffers(networks).items()}
    for i, p in enumerate(parameters):
        tensors[f"parameter.{i}"] = p.detach().contiguous()
        tensors[f"momentum.{i}"] = optimizer.state[p]["momentum_buffer"].contiguous()
    with cache.replaced(checkpoint) as temporary:
        save_file(tensors, temporary, metadata={"history": json.dumps(history)})


@torch.no_grad()
def _restore(checkpoint, networks, parameters, optimizer, config) -> list[dict]:
    """Load a checkpoint into the run and return its history; an empty history where there is none."""
    if checkpoint is None or not checkpoint.exists():
        return []
    with safe_open(checkpoint, "pt") as file:
        history = json.loads(file.metadata()["history"])
    tensors = load_file(checkpoint)
    for name, buffer in _buffers(networks).items():
        buffer.copy_(tensors[name])
    for i, p in enumerate(parameters):
        p.copy_(tensors[f"parameter.{i}"])
        optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(tensors[f"momentum.{i}"])
    return history
