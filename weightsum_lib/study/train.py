"""One training run: a function of a frozen configuration, its datasets, and the weights it starts from."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib.core.batchnorm import recalibrate
from weightsum_lib.core.keys import Key, compact, draw
from weightsum_lib.core.losses import three_term_loss
from weightsum_lib.core.merging import random_signs
from weightsum_lib.core.models import normalize
from weightsum_lib.core.weights import WeightSum
from weightsum_lib.study import store
from weightsum_lib.study.config import RunConfig, build, channels_of, key_of
from weightsum_lib.study.params import Method

_SHIFT = 2  # pixels by which a training image is moved at most
_FLIPPED = ("cifar10",)  # digits are never mirrored
_MAX_GRADIENT = 5.0  # L2 norm to which the gradient is clipped: early steps of a sum can be wild
_CALIBRATION = 500  # training images that set the batch-norm statistics of a sum before it is validated
_WARMUP = 0.2  # share of the steps in which the learning rate grows
_UNPRUNED = 0.1  # of the weights of a layer that is pruned


@dataclass
class Run:
    """A finished run: its networks by role ("main", "support") in evaluation mode, and a row for each epoch, with the
    columns that :func:`train` names."""

    config: RunConfig
    networks: dict[str, nn.Module]
    history: list[dict]


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
    padded = F.pad(images, (_SHIFT,) * 4)
    moves = torch.randint(0, 2 * _SHIFT + 1, (2, n, 1), generator=generator, device=images.device)
    rows = moves[0] + torch.arange(height, device=images.device)
    columns = moves[1] + torch.arange(width, device=images.device)
    if flip:
        mirrored = torch.rand((n, 1), generator=generator, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(n, device=images.device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(config: RunConfig, role: str, dataset, epoch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the shuffled, augmented batches of one epoch of one task: network input (N, 3, 32, 32), labels (N,)."""
    images, labels = dataset.train_images, dataset.train_labels
    generator = torch.Generator(images.device)
    generator.manual_seed(config.stream(role, f"order of epoch {epoch}"))
    wanted, order = steps * config.batch_size, []
    while sum(map(len, order)) < wanted:
        order.append(torch.randperm(len(labels), generator=generator, device=images.device))
    flip = dataset.name.split(" ")[0] in _FLIPPED
    for index in torch.cat(order)[:wanted].split(config.batch_size):
        yield normalize(augment(images[index], generator, flip)), labels[index]


def _learning_rate(config: RunConfig, progress: float) -> float:
    """Linear warm-up, then a half cosine to zero; ``progress`` runs from 0 to 1."""
    if progress < _WARMUP:
        return config.learning_rate * progress / _WARMUP
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))


def _ramp(progress: float, share: float) -> float:
    """A factor that grows linearly from 0 to 1 in the first ``share`` of the steps."""
    return min(1.0, progress / share) if share else 1.0


@dataclass
class _Step:
    """What the terms of one step are computed from; ``batches`` holds (x, y) by role, ``total`` is the sum or None."""

    config: RunConfig
    networks: Mapping[str, nn.Module]
    total: WeightSum | None
    batches: Mapping[str, tuple[Tensor, Tensor]]
    progress: float

    @functools.cached_property
    def on_the_others_images(self) -> tuple[Tensor, Tensor]:
        """Logits of the support network on the main task's images, and the other way round, under own statistics."""
        (x, _), (x_support, _) = self.batches["main"], self.batches["support"]
        by_support = _with_own_statistics(self.networks["support"], x)
        return by_support, _with_own_statistics(self.networks["main"], x_support)


# A further switch of a method needs no more than a field of ``Method`` and a function here: ``term_<switch>`` is added
# to the loss (it grows as the third term does), ``after_<switch>`` follows the optimizer's step, each where the switch
# is on. Runs without it don't reach its code, and keep their key.


def term_quiet(step: _Step) -> Tensor:
    """Each network should answer the other's images with a uniform distribution (Hendrycks et al. 2019)."""
    by_support, by_main = step.on_the_others_images
    return step.config.method.quiet * (_uniformity(by_support) + _uniformity(by_main))


def term_quiet_also(step: _Step) -> Tensor:
    """Each network should be as quiet on images that are of no task (:func:`of_no_task`)."""
    strange = of_no_task(step.config.method.quiet_also, *(x for x, _ in step.batches.values()))
    said = (_uniformity(_with_own_statistics(network, strange)) for network in step.networks.values())
    return step.config.method.quiet * sum(said)


def term_mixed_batch(step: _Step) -> Tensor:
    """The sum must solve both tasks on images of both in one batch: one set of statistics, as it has after training."""
    images, labels = zip(*step.batches.values(), strict=True)
    logits = step.total(torch.cat(images)).float().split([len(x) for x in images])
    smoothing = step.config.method.label_smoothing
    return sum(F.cross_entropy(z, y, label_smoothing=smoothing) for z, y in zip(logits, labels, strict=True))


def of_no_task(kind: str, x: Tensor, other: Tensor) -> Tensor:
    """Network input that shows nothing, drawn from PyTorch's own stream.

    Args:
        kind: "noise", colours that change every 1 to 8 pixels; "patches", images of both tasks in 4 x 4 shuffled
            pieces; "blends", an image of each task over the other; "any" of these, another each time.
        x: images of one task (N, 3, 32, 32), normalized.
        other: images of the other one, as many.
    """
    kinds = ("noise", "patches", "blends")
    kind = kinds[torch.randint(len(kinds), ())] if kind == "any" else kind
    n, *_, size = x.shape
    if kind == "noise":
        points = size >> int(torch.randint(4, ()))
        coarse = torch.rand(n, 3, points, points, device=x.device)
        return normalize(255 * F.interpolate(coarse, size=(size, size), mode="bilinear"))
    if kind == "blends":
        return x.lerp(other, 0.3 + 0.4 * torch.rand(n, 1, 1, 1, device=x.device))
    pieces = F.unfold(torch.cat([x[: n // 2], other[n // 2 :]]), size // 4, stride=size // 4)
    return F.fold(pieces[..., torch.randperm(16, device=x.device)], (size, size), size // 4, stride=size // 4)


@torch.no_grad()
def after_equal_norms(networks: Mapping[str, nn.Module]) -> None:
    """Scale each layer's weights of both networks to the mean of their norms."""
    for layer in zip(*(n.modules() for n in networks.values()), strict=True):
        if isinstance(layer[0], nn.Conv2d | nn.Linear):
            norms = [module.weight.norm() for module in layer]
            for module, norm in zip(layer, norms, strict=True):
                module.weight *= sum(norms) / len(norms) / norm


@torch.no_grad()
def after_pruned(networks: Mapping[str, nn.Module]) -> None:
    """Magnitude pruning: of each hidden layer's weights only the largest tenth is not zero; any may come back."""
    for network in networks.values():
        *hidden, _ = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for weight in hidden:
            size = weight.abs()
            weight *= size >= size.flatten().kthvalue(weight.numel() - int(_UNPRUNED * weight.numel()) + 1).values


@torch.no_grad()
def after_superposed(networks: Mapping[str, nn.Module]) -> None:
    """Hold both networks as one set of weights, the second one's under random signs (Cheung et al. 2019).

    It is the mean of what the steps of both made of it: gradient descent on the mean of their losses. Biases and the
    parameters of batch norm, which have one axis, stay each network's own.
    """
    first, second = networks.values()
    for to, of, weight in ((first, second, 0.5), (second, first, 1.0)):
        signed = random_signs(of, torch.Generator().manual_seed(0))  # the same ones always
        for own, other in zip(to.parameters(), signed.parameters(), strict=True):
            if own.ndim > 1:
                own.lerp_(other, weight)


def hooks(method: Method) -> dict[str, list[Callable]]:
    """The functions of this module that a method's switches bring in: "term" and "after" to a list of each."""
    here, on = globals(), method.switches()
    return {kind: [here[f"{kind}_{s}"] for s in on if f"{kind}_{s}" in here] for kind in ("term", "after")}


def _with_own_statistics(network: nn.Module, x: Tensor) -> Tensor:
    """The output of a network in training whose batch norm uses the running statistics, as it will after training."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.eval()
    logits = network(x).float()
    for norm in norms:
        norm.train()
    return logits


def _uniformity(logits: Tensor) -> Tensor:
    """Cross-entropy to the uniform distribution, less its minimum (nats): how loudly a network answers."""
    return -logits.log_softmax(-1).mean() - math.log(logits.shape[-1])


def step_losses(step: _Step, terms: Sequence[Callable] = ()) -> dict[str, Tensor]:
    """One step's named losses; "total" is what is minimized."""
    config, m, networks, total = step.config, step.config.method, step.networks, step.total
    x, y = step.batches["main"]
    logits = networks["main"](x).float()
    if total is None:
        loss = F.cross_entropy(logits, y, label_smoothing=m.label_smoothing)
        return {"total": loss, "main": loss}
    x_support, y_support = step.batches["support"]
    logits_support = networks["support"](x_support).float()
    weight, held = m.third_weight * _ramp(step.progress, config.third_ramp), [1] if m.symmetric_to == "main" else []
    further = [term(step) for term in terms]
    reading = {"third": m.third, "weight": weight, "label_smoothing": m.label_smoothing}
    if m.owner_statistics:  # the keys are disjoint, so that the sum of the weights adds the logits
        by_support, by_main = step.on_the_others_images
        logits_sum, other = logits + by_support, (logits_support.detach() if held else logits_support) + by_main
    else:
        logits_sum, other = total(x).float(), total(x_support, held=held).float() if m.symmetric else None
    reading["logits_sum_support"] = other if m.symmetric else None
    losses = three_term_loss(logits, y, logits_support, y_support, logits_sum, **reading)
    return losses._asdict() | {"total": losses.total + sum(weight * term for term in further)}


class _Keys:
    """Where the two networks of a pair lie in their sum, step by step."""

    def __init__(self, config: RunConfig):
        self.config, self.channels = config, channels_of(config)
        m = config.method
        self.room = m.sum_width / m.network_width
        blocks = range(2) if m.keys != "none" else (0, 0)
        self.own = [key_of(config, role, m.keys, self.room, i) for role, i in zip(config.roles, blocks, strict=True)]

    def epoch(self, epoch: int, steps: int) -> Iterator[list[Key]]:
        """Yield each step's keys."""
        config, m = self.config, self.config.method
        generator = torch.Generator().manual_seed(config.stream("support", f"permutations of epoch {epoch}"))
        own = compact(self.own)
        for step in range(steps):
            progress = (epoch * steps + step) / (config.epochs * steps)
            share = m.permuted_support * _ramp(progress, config.permuted_ramp)
            if torch.rand((), generator=generator) < share:
                drawn = draw(self.channels, self.room, generator)
                main = draw(self.channels, self.room, generator) if m.permuted_main else self.own[0]
                yield compact([main, drawn])
            else:
                yield own


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor, precision: str, batch: int | None = None) -> Tensor:
    """What a network in evaluation mode answers.

    Args:
        network: in evaluation mode.
        images: uint8 (N, 3, 32, 32).
        precision: see :func:`autocast`.
        batch: images at a time; by default on a CPU few, so that what lies between two layers fits into its cache.

    Returns:
        logits (N, classes), float32.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    batch = batch or (100 if images.device.type == "cpu" else 500)
    with autocast(precision, images.device):
        logits = torch.cat([network(normalize(x)).float() for x in images.split(batch)])
    if not logits.isfinite().all():
        raise FloatingPointError("a network's answers are not finite numbers: its weights or statistics are broken")
    return logits


def percent_right(network: nn.Module, images: Tensor, labels: Tensor, precision: str) -> float:
    """Percent of images (N, 3, 32, 32) that a network in evaluation mode puts into the right class."""
    right = logits_of(network, images, precision).argmax(1) == labels
    return 100 * right.sum().item() / len(labels)


def optimizer_of(config: RunConfig, parameters: Sequence[nn.Parameter], fused: bool = True) -> torch.optim.SGD:
    """SGD with Nesterov momentum 0.9."""
    rate, decay = config.learning_rate, config.weight_decay
    return torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=decay, fused=fused)


def update(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """What follows a backward pass: clip the gradient, step, forget the gradient."""
    nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


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
        datasets: name to :class:`~weightsum_lib.Dataset`, on the device to train on.
        start: for ``sequential`` runs that don't start at random: the network to fine-tune, or the
            networks whose sum is fine-tuned (a sum starts without batch-norm statistics).
        checkpoint: file that keeps the state after each epoch, so that a killed run goes on from there
            with the same numbers; the caller removes it when the run is kept.
        on_epoch: called with each epoch's row: ``epoch`` (from 1), mean training losses
            ``loss_main``, ``loss_support``, ``loss_third`` (nats), validation accuracies
            ``val_main``, ``val_support``, ``val_sum``, and where the third term is symmetric
            ``val_sum_support`` (the sum on the support task; percent), ``seconds``.

    Raises:
        FloatingPointError: a loss or a weight is no longer finite; says in which step, at which learning rate. The
            checkpoint is that of the epoch before.
    """
    device = datasets[config.main].train_images.device
    networks = {role: build(config, role).to(device) for role in config.roles}
    if start:
        origin = WeightSum(start).materialize() if len(start) > 1 else start[0]
        networks["main"].load_state_dict(origin.state_dict())
    keyed = config.method.keys != "none" or config.method.permuted_support > 0
    keys, total = _Keys(config) if keyed else None, None
    if config.method.protocol == "joint":
        total = WeightSum(list(networks.values()), keys=compact(keys.own) if keyed else None)
    parameters = [p for network in networks.values() for p in network.parameters()]
    optimizer, hooked = optimizer_of(config, parameters), hooks(config.method)
    steps = config.epoch_images // config.batch_size
    state = {f"{role}/{name}": t for role, n in networks.items() for name, t in n.state_dict().items()}
    for i, p in enumerate(parameters):  # momentum from 0, as without a buffer, but there to be restored
        state[f"momentum/{i}"] = optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    history = _restore(checkpoint, state) if checkpoint else []
    for epoch in range(len(history), config.trained_epochs):
        started = time.perf_counter()
        for network in networks.values():
            network.train()
        places = keys.epoch(epoch, steps) if config.method.permuted_support else itertools.repeat(None, steps)
        seen = []  # each step's losses, read once an epoch: no waiting for the device in between
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.stream("main", f"dropout of epoch {epoch}"))
            feeds = (batches(config, r, datasets[name], epoch, steps) for r, name in config.roles.items())
            for i, (pairs, place) in enumerate(zip(zip(*feeds, strict=True), places, strict=True)):
                if place:
                    total.use_keys(place)
                progress = (epoch * steps + i) / (config.trained_epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = _learning_rate(config, progress)
                with autocast(config.precision, device):
                    by_role = dict(zip(config.roles, pairs, strict=True))
                    losses = step_losses(_Step(config, networks, total, by_role, progress), hooked["term"])
                losses["total"].backward()
                update(parameters, optimizer)
                for after in hooked["after"]:
                    after(networks)
                seen.append(torch.stack([loss.detach() for loss in losses.values()]))
        seen = torch.stack(seen).cpu()
        _check_finite(config, epoch, seen[:, 0], state)
        means = zip(losses, seen.mean(0).tolist(), strict=True)
        row = {"epoch": epoch + 1} | {f"loss_{name}": mean for name, mean in means if name != "total"}
        for role, network in networks.items():
            dataset = datasets[config.roles[role]]
            row[f"val_{role}"] = percent_right(network.eval(), dataset.val_images, dataset.val_labels, config.precision)
        if total:
            if keyed:
                total.use_keys(compact(keys.own))
            row |= _validate_sum(config, total, datasets)
        row["seconds"] = time.perf_counter() - started
        history.append(row)
        if checkpoint:
            store.write_tensors(checkpoint, state, {"run": checkpoint.parent.name, "history": history})
        on_epoch(row)
    for network in networks.values():
        network.eval()
    return Run(config, networks, history)


def _check_finite(config: RunConfig, epoch: int, losses: Tensor, state: Mapping[str, Tensor]) -> None:
    """Raise FloatingPointError for an epoch in which a loss (steps,) or after which a weight is not finite."""
    steps, sound = len(losses), int(losses.isfinite().cumprod(0).sum())  # steps before the first that is not
    broken = ["the loss"] if sound < steps else [f"'{name}'" for name, t in state.items() if not t.isfinite().all()]
    if broken:
        step = epoch * steps + min(sound, steps - 1)
        rate = _learning_rate(config, step / (config.trained_epochs * steps))
        where = f"in epoch {epoch + 1}, step {step + 1} (learning rate there {rate:.3g})"
        mend = f"lower learning_rate (now {config.learning_rate}) or raise third_ramp (now {config.third_ramp})"
        raise FloatingPointError(f"{config.describe()}: {broken[0]} is not finite {where}; {mend}")


def _validate_sum(config: RunConfig, total: WeightSum, datasets: Mapping) -> dict[str, float]:
    """The sum on the validation images of the main task, and of the support task where the third term asks for it."""
    row, asked = {}, ["val_sum", "val_sum_support"][: 1 + config.method.symmetric]
    for key, name in zip(asked, config.roles.values(), strict=False):
        dataset = datasets[name]
        with autocast(config.precision, dataset.train_images.device):
            if config.method.owner_statistics:
                total.add_statistics()
            else:
                recalibrate(total, normalize(dataset.train_images[:_CALIBRATION]))
        plain = total.materialize().eval()
        row[key] = percent_right(plain, dataset.val_images, dataset.val_labels, config.precision)
    return row


@torch.no_grad()
def _restore(checkpoint: Path, state: Mapping[str, Tensor]) -> list[dict]:
    """Load a run's checkpoint and return its history; an empty one where there is none that this run wrote."""
    tensors, about = store.read_tensors(checkpoint) or ({}, None)
    match about:
        case {"run": run, "history": list(history)} if run == checkpoint.parent.name and alike(tensors, state):
            for name, tensor in state.items():
                tensor.copy_(tensors[name])
            return history
    return []


def alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether stored tensors have the names, shapes and types that are expected, and finite values."""
    kinds = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (found, expected)]
    return kinds[0] == kinds[1] and all(t.isfinite().all() for t in found.values())
