"""Keys: which hidden channels of a wide network a small one uses, so that networks can share room, or not."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

# What layers say of their weight's sizes, axis by axis; of a transposed convolution's the other way round.
_SIZES = {
    _NormBase: ("num_features",),
    nn.PReLU: ("num_parameters",),
    nn.Linear: ("out_features", "in_features"),
    _ConvNd: ("out_channels", "in_channels"),
}


@dataclass(frozen=True, eq=False)
class Channels:
    """Which axes of a network's tensors run over which of its hidden channels.

    Layers whose channels are added or multiplied together, as in a residual stage, are one group. Channels that
    reach the network's input or output are not hidden: they are the same for every network, and in no group.

    Args:
        axes: name of every parameter and buffer to its (axis, group, entries for each channel), e.g.
            ``{"fc1.weight": ((0, "fc1", 1), (1, "conv4", 4)), "fc2.bias": ()}``.
        sizes: group to number of channels, in the order of the computation. A group has the name of the layer that
            computes its channels first.
    """

    axes: dict[str, tuple[tuple[int, str, int], ...]]
    sizes: dict[str, int]


@dataclass(frozen=True, eq=False)
class Key:
    """Where the hidden channels of a network lie in a wider network of the same architecture.

    A network under a key is the wide network that has zeros in all channels which the key leaves out; it
    computes the same function as the small network that it holds. A key of full size is a permutation.

    Args:
        channels: the small network's hidden channels.
        positions: group to distinct channel numbers (channels,), int64, one for each of the small network's.
        sizes: group to the wide network's number of channels.

    Raises:
        ValueError: a group that is missing or unknown, a channel twice or out of range, another number of channels
            than the small network has; the group is named.
    """

    channels: Channels
    positions: dict[str, Tensor]
    sizes: dict[str, int]

    def __post_init__(self):
        for given in (self.positions, self.sizes):
            _check_groups(self.channels, given)
        for group, count in self.channels.sizes.items():
            places, size = self.positions[group], self.sizes[group]
            fit = places.shape == (count,) and places.dtype == torch.int64
            if not fit or int(places.min()) < 0 or int(places.max()) >= size:
                what = f"{count} positions in 0 ... {size - 1}, int64, for '{group}'"
                raise ValueError(f"a key has {what}, got {places.tolist()}")
            if int(places.bincount().max()) > 1:
                raise ValueError(f"a key with a channel twice: '{group}' has positions {places.tolist()}")

    def to(self, device: torch.device) -> "Key":
        """The same key on a device. The host does not wait for the copies."""
        moved = copy.copy(self)  # checked already; a check would wait
        vars(moved)["positions"] = {g: numbers.to(device, non_blocking=True) for g, numbers in self.positions.items()}
        return moved


def _check_groups(channels: Channels, given: Mapping[str, object]) -> None:
    if channels.sizes.keys() != given.keys():
        raise ValueError(f"expected a value for each of the groups {list(channels.sizes)}, got {list(given)}")


def _wide_sizes(channels: Channels, width: float | Mapping[str, float]) -> dict[str, int]:
    factors = width if isinstance(width, Mapping) else dict.fromkeys(channels.sizes, width)
    _check_groups(channels, factors)
    wide = {group: round(size * factors[group]) for group, size in channels.sizes.items()}
    for group, size in channels.sizes.items():
        if wide[group] < size:
            raise ValueError(f"a width of {factors[group]} leaves {wide[group]} of the {size} channels of '{group}'")
    return wide


def draw(channels: Channels, width: float | Mapping[str, float], generator: torch.Generator) -> Key:
    """A key drawn at random, with no regard to any other: each group's channels in random places.

    Args:
        channels: the small network's hidden channels.
        width: factor on the number of channels, one for all groups or a mapping with one for each; 1 draws a
            permutation.
        generator: of the random numbers, on the CPU.

    Raises:
        ValueError: a factor that leaves fewer channels than the network has.

    >>> channels = Channels({"fc1.weight": ((0, "fc1", 1),)}, {"fc1": 2})
    >>> draw(channels, 4.0, torch.Generator().manual_seed(0)).sizes
    {'fc1': 8}
    """
    wide = _wide_sizes(channels, width)
    positions = {g: torch.randperm(wide[g], generator=generator)[:size] for g, size in channels.sizes.items()}
    return Key(channels, positions, wide)


def deal(channels: Channels, width: float | Mapping[str, float], index: int) -> Key:
    """The key of block ``index``, at equal ``width``: keys of different blocks are disjoint, by agreement.

    Args:
        channels: the small network's hidden channels.
        width: see :func:`draw`.
        index: number of the block, from 0.

    Raises:
        ValueError: the wide network has fewer than ``index`` + 1 blocks of that size.

    >>> channels = Channels({"fc1.weight": ((0, "fc1", 1),)}, {"fc1": 2})
    >>> deal(channels, 4.0, 1).positions
    {'fc1': tensor([2, 3])}
    """
    wide = _wide_sizes(channels, width)
    for group, size in channels.sizes.items():
        if not 0 <= index < wide[group] // size:
            what = f"no room for {index + 1} disjoint keys: {size} of the {wide[group]} channels of '{group}' each"
            raise ValueError(f"{what}; make the sum wider or sum fewer networks (the first index is 0)")
    return Key(channels, {g: torch.arange(size) + index * size for g, size in channels.sizes.items()}, wide)


def compact(keys: Sequence[Key]) -> list[Key]:
    """The same keys in a network with as many channels as they may use together, no more.

    A sum under these is the same function with less to compute. Where keys overlap some of its channels are
    nobody's, so that the shapes are the same for all keys of one size: new ones are slow at first.

    Raises:
        ValueError: keys for wide networks of different sizes.
    """
    if other := [key.sizes for key in keys if key.sizes != keys[0].sizes]:
        raise ValueError(f"keys of one sum are for one wide network, got {keys[0].sizes} and {other[0]}")
    taken = {group: torch.cat([key.positions[group] for key in keys]) for group in keys[0].sizes}
    sizes = {group: min(len(taken[group]), wide) for group, wide in keys[0].sizes.items()}
    used = {group: positions.unique() for group, positions in taken.items()}
    packed = [{g: torch.searchsorted(used[g], numbers) for g, numbers in key.positions.items()} for key in keys]
    return [Key(key.channels, positions, sizes) for key, positions in zip(keys, packed, strict=True)]


def overlap(a: Key, b: Key) -> dict[str, float]:
    """The share of ``a``'s channels that ``b`` uses too, group by group."""
    return {g: torch.isin(p, b.positions[g]).float().mean().item() for g, p in a.positions.items()}


def embed(state: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
    """A small network's tensors in the wide network, zero where the key leaves channels out; differentiable.

    Args:
        state: parameters or buffers by name, all of them or some.
        key: where its channels go.

    Raises:
        ValueError: a tensor that the key's network does not have, or of another shape; it is named.

    >>> channels = Channels({"fc1.weight": ((0, "fc1", 1),)}, {"fc1": 2})
    >>> embed({"fc1.weight": torch.ones(2, 1)}, deal(channels, 2.0, 1))["fc1.weight"].flatten()
    tensor([0., 0., 1., 1.])
    """
    wide = dict(state)
    for name, tensor in state.items():
        if name not in key.channels.axes:
            raise ValueError(f"'{name}' is no tensor of the network that the key is for")
        if not (axes := key.channels.axes[name]):
            continue
        shape = list(tensor.shape)
        # up to the last keyed axis, and the first two at least: gradients have one memory layout then
        index = [torch.arange(n, device=tensor.device) for n in shape[: max(2, 1 + max(axes)[0])]]
        for axis, group, each in axes:
            places = key.positions[group].to(tensor.device)
            if tensor.ndim <= axis or shape[axis] != len(places) * each:
                what = f"{len(places)} channels of '{group}', {each} entries each, on axis {axis}"
                raise ValueError(f"'{name}' is {tuple(tensor.shape)}, but its key is for {what}")
            index[axis] = (places[:, None] * each + torch.arange(each, device=tensor.device)).flatten()
            shape[axis] = key.sizes[group] * each
        zeros = tensor.new_zeros(shape)
        if tensor.ndim == 4:
            zeros = zeros.contiguous(memory_format=torch.channels_last)  # in which convolutions are fastest
        wide[name] = zeros.index_put(torch.meshgrid(index, indexing="ij"), tensor)
    return wide


def tensors_in(tree: object) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def tensors_of(network: nn.Module, every_name: bool = False) -> dict[str, Tensor]:
    """A network's parameters and buffers by name; of a tensor with several names the first, or each."""
    once = not every_name
    return dict([*network.named_parameters(remove_duplicate=once), *network.named_buffers(remove_duplicate=once)])


def check_channels(network: nn.Module, channels: Channels) -> None:
    """Raise ValueError, with the tensor's name, where these are the channels of another network."""
    if other := channels.axes.keys() ^ tensors_of(network, every_name=True).keys():
        raise ValueError(f"'{min(other)}' is in the network or in the channels only; take the channels of this network")


def widen(network: nn.Module, key: Key) -> nn.Module:
    """The wide network that holds a small one where the key says and zeros elsewhere; the same function.

    Args:
        network: left as it is.
        key: where its hidden channels go.

    Raises:
        ValueError: the key is for another network.
    """
    check_channels(network, key.channels)
    return with_tensors(network, embed(tensors_of(network), key))


def with_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network that holds other tensors, of other sizes perhaps; what layers say of their sizes follows.

    Args:
        network: left as it is. Tensors that it holds under two names stay one tensor.
        tensors: all parameters and buffers by name, copied; parameters require gradients as the network's do.
    """
    memo = {}  # what deepcopy puts in place of the network's own tensors, and of what forward has kept with its graph
    for module in network.modules():
        held = [*vars(module).values()]
        held += [getattr(leaf, "__dict__", {}) for leaf in tree_leaves(held)]
        memo |= {id(t): t.detach().clone() for t in tensors_in(held) if t.grad_fn is not None}
    for name, tensor in tensors_of(network).items():
        held = tensors[name].detach().clone()
        memo[id(tensor)] = nn.Parameter(held, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else held
    wide = copy.deepcopy(network, memo)
    for module, small in zip(wide.modules(), network.modules(), strict=True):
        held = "running_mean" if getattr(module, "weight", None) is None else "weight"
        held, before = getattr(module, held, None), getattr(small, held, None)
        other = isinstance(held, Tensor) and before.numel() and held.shape != before.shape  # the body of a sum has none
        sizes = list(held.shape) if other else []
        names = [name for kind, its in _SIZES.items() if isinstance(module, kind) for name in its]
        if isinstance(module, _ConvNd) and sizes:
            names = names[::-1] if module.transposed else names
            if module.groups > 1:  # depthwise: as many groups as channels
                module.groups = module.groups * sizes[0] // getattr(module, names[0])
            sizes[1] *= module.groups
        vars(module).update(zip(names, sizes, strict=False))
    return wide
