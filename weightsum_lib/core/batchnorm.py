"""Batch-norm statistics of a sum: it has none of its own, and adding its parents' would be wrong."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib.core.keys import embed
from weightsum_lib.core.weights import WeightSum


class _Reached(BaseException):
    """A pass has come to the layer that it is for; no ``except Exception`` of the network's own stops it."""


@torch.no_grad()
def recalibrate(module: nn.Module, images: Tensor | Iterable, owners: Tensor | None = None) -> nn.Module:
    """Set every batch-norm layer's running statistics to those of its inputs on these images.

    Label-free, as in REPAIR (Jordan et al. 2022). The statistics are those of the whole set (mean, and unbiased
    variance) with every earlier layer already recalibrated, not an average over mini-batches. Dropout is off. On a
    :class:`~weightsum_lib.WeightSum` only the sum's own statistics change. Training goes on from them: a layer with
    ``momentum=None``, which averages over all batches, counts them as those of as many batches as were given.

    Args:
        module: a network or a sum; changed in place, its mode is kept.
        images: network input (N, C, H, W), N ≥ 2, which goes through as one batch (VGG16 at width 1 takes about
            1 MiB of memory an image). Or batches of it, or of (input, labels), that can be gone through again: a list,
            or a DataLoader that gives the same images each time, in whatever order. That is exact too, layer by
            layer: for each layer one pass over all batches, as far as that layer, and in the end a whole one.
        owners: (N,) integers, for a sum and images in one tensor: the number of the network whose task each image is
            of. Under keys a channel that one network alone has then gets its statistics from that network's images,
            one that several share from all of theirs, and with disjoint keys each network has its own statistics.
            Channels that all networks share (without keys: all of them) have those of all images, as without
            ``owners``. It presumes images sorted by task, but no task of a test image.

    Returns:
        the same module.

    Raises:
        TypeError: an iterator, which one pass uses up, or something that holds no tensors.
        ValueError: ``owners`` of something else than a sum and a tensor of as many images, a network with fewer than
            two of them, or a layer that has another number of inputs; fewer than two images, images that change from
            pass to pass, inputs of a layer that are not finite; a scripted module; a layer that keeps no running
            statistics, is used twice or never reached. The layer is named.
    """
    whole = isinstance(images, Tensor)
    if isinstance(images, Iterator) or not isinstance(images, Iterable):
        kind = type(images).__name__
        raise TypeError(f"{kind} can't be gone through once a layer; give a tensor, a list of batches or a DataLoader")
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        raise ValueError("a scripted or traced module hides its batch norm; recalibrate the network before that")
    parents = {m for s in module.modules() if isinstance(s, WeightSum) for m in s.networks.modules()}
    names = {m: n for n, m in module.named_modules() if isinstance(m, _BatchNorm) and m not in parents}
    if silent := [name for layer, name in names.items() if layer.running_mean is None]:
        raise ValueError(f"'{silent[0]}' keeps no running statistics to set: it always uses those of the batch")
    if owners is not None:
        owners = torch.as_tensor(owners)
        fit = isinstance(module, WeightSum) and whole and owners.shape == (len(images),) and owners.numel()
        fit = fit and not owners.is_floating_point() and owners.dtype != torch.bool and int(owners.min()) >= 0
        if not fit or len(count := owners.bincount()) != len(module.networks) or int(count.min()) < 2:
            raise ValueError("owners are one network number an image, of a sum and a tensor; each has two or more")
        owners = owners.to(images.device)
    called, done, stops, first = set(), set(), [], None

    def settle(layer: _BatchNorm, moments: list[tuple], batches: int) -> None:
        variance, mean = (value.to(layer.running_var.dtype) for value in _pooled(moments))
        if not (variance.isfinite() & mean.isfinite()).all():
            raise ValueError(f"inputs of '{names[layer]}' have no finite variance: NaN, overflow or one value alone")
        layer.running_var.copy_(variance)
        layer.running_mean.copy_(mean)
        layer.num_batches_tracked.fill_(batches)
        done.add(layer)

    def estimate(layer: _BatchNorm, args: tuple, kwargs: dict) -> None:
        if layer in called:
            raise ValueError(f"'{names[layer]}' is used twice: its inputs have no one mean")
        called.add(layer)
        if layer in done:
            return
        x = (*args, *kwargs.values())[0]
        parts = [(x, 1.0)]
        if owners is not None:
            if len(x) != len(owners):
                raise ValueError(f"'{names[layer]}' has {len(x)} inputs, of {len(owners)} images: whose are they?")
            parts = [(x[owners == i], share) for i, share in enumerate(_shares(module, names[layer]))]
        moments = [moment for part in parts for moment in _moments(*part)]
        if not whole:
            stops.append((layer, moments))
            raise _Reached
        settle(layer, moments, 1)

    with ExitStack() as undo:
        for m in module.modules():
            undo.callback(setattr, m, "training", m.training)
            m.training = False
        for layer in names:
            undo.enter_context(layer.register_forward_pre_hook(estimate, with_kwargs=True))
        while first is None or stops:
            stops.clear()
            seen = torch.zeros(3, dtype=torch.float64)  # batches, images, and the sum of their squares
            for batch in [images] if whole else images:
                x = batch[0] if isinstance(batch, tuple | list) else batch
                if not isinstance(x, Tensor):
                    raise TypeError(f"expected batches of images, or of (images, labels), got a {type(x).__name__}")
                called.clear()
                with suppress(_Reached):
                    module(x)
                seen += torch.tensor([1, len(x), x.double().square().sum().item()], dtype=seen.dtype)
            if seen[1] < 2:
                raise ValueError(f"batch-norm statistics need two images or more, got {int(seen[1])}")
            first = seen if first is None else first
            same = torch.allclose(seen, first, rtol=1e-9, atol=0, equal_nan=True)
            if not same or len(stops) not in (0, seen[0]) or len({layer for layer, _ in stops}) > 1:
                raise ValueError("the images, or what is computed on them, changed between passes (augmentation?)")
            if stops:
                settle(stops[0][0], [moment for _, moments in stops for moment in moments], len(stops))
        if missed := [name for layer, name in names.items() if layer not in done]:
            raise ValueError(f"'{missed[0]}' is never reached, so that it has no inputs; remove it, or set it to None")
    return module


def _shares(total: WeightSum, name: str) -> list[Tensor | float]:
    """For each network of a sum: 1 for channels of a batch norm whose statistics its images set, else 0; (C,)."""
    mean = f"{name.removeprefix('body.')}.running_mean"
    if not total.keys or not total.keys[0].channels.axes[mean]:
        return [1.0] * len(total.networks)
    own = torch.ones_like(total.networks[0].get_buffer(mean))
    owned = torch.stack([embed({mean: own}, key)[mean] for key in total.keys])
    return [*owned + (owned.sum(0) == 0)]  # what is nobody's has nothing to tell apart


def _moments(x: Tensor, share: Tensor | float = 1.0, piece: int = 2**19) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Mean, sum of squared deviations and number of values, each (C,), of each piece; the last two times ``share``.

    With :func:`_pooled` that is ``torch.var_mean(x.float(), [0, 2, 3])``, five times as fast: two passes over pieces
    that fit into a CPU's cache, put together by Chan, Golub and LeVeque (1983).

    Args:
        x: (N, C) or (N, C, ...), any floating type; computed in float32 at least, put together in float64.
        share: factor on what the values count, a number or one a channel (C,).
        piece: values at a time, about.
    """
    moments = []
    for images in x.split(max(1, piece // max(1, x[:1].numel()))):
        values = images.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, -1).flatten(0, -2)
        mean = values.mean(0)
        counts = torch.full_like(mean, len(values), dtype=torch.float64)
        moments.append((mean, share * (values - mean).square_().sum(0), share * counts))
    return moments


def _pooled(moments: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Unbiased variance and mean of all pieces together, each (C,) float64."""
    means, squares, counts = (torch.stack(values).double() for values in zip(*moments, strict=True))
    mean = (counts * means).sum(0) / counts.sum(0)
    return (squares.sum(0) + (counts * (means - mean).square()).sum(0)) / (counts.sum(0) - 1), mean
