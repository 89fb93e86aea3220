"""Keys: which hidden channels of a wide network a small one uses, so that networks can share room, or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib.models import memory_format


@dataclass(frozen=True)
class Key:
    """Where the hidden channels of a network lie in a wider network of the same architecture.

    A network under a key is the wide network that has zeros in all channels which the key leaves out; it
    computes the same function as the small network that it holds. A key of full size is a permutation.

    Args:
        positions: hidden layer to distinct channel numbers (channels,), int64, one for each of the small network's.
        sizes: hidden layer to the wide network's number of channels.
    """

    positions: dict[str, Tensor]
    sizes: dict[str, int]

    def to(self, device: torch.device) -> "Key":
        """The same key on a device. The host does not wait for the copies."""
        return Key({n: p.to(device, non_blocking=True) for n, p in self.positions.items()}, self.sizes)


def channel_axes(network: nn.Module) -> dict[str, list[tuple[int, str, int]]]:
    """Which axes of which tensors run over hidden channels.

    Args:
        network: convolutions, batch norms and linear layers, registered in the order of the computation,
            without branches; the last linear layer gives the output, which is not hidden.

    Returns:
        name of a parameter or buffer to (axis, hidden layer, entries for each channel), e.g.
        ``{"classifier.fc1.weight": [(0, "classifier.fc1", 1), (1, "features.conv4_1", 4)]}``.
    """
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | _BatchNorm)]
    last = next(n for n, m in reversed(layers) if not isinstance(m, _BatchNorm))
    axes, previous, channels = {}, None, None
    for name, module in layers:
        if isinstance(module, _BatchNorm):
            tensors = [k for k, v in module.state_dict().items() if v.ndim]
            axes |= {f"{name}.{k}": [(0, previous, 1)] for k in tensors}
            continue
        own = [] if name == last else [(0, name, 1)]
        before = [(1, previous, module.weight.shape[1] // channels)] if previous else []
        axes[f"{name}.weight"] = own + before
        if module.bias is not None:
            axes[f"{name}.bias"] = own
        previous, channels = name, len(module.weight)
    return axes


def hidden_sizes(network: nn.Module) -> dict[str, int]:
    """The number of channels of each hidden layer, in the order of the computation."""
    state = network.state_dict()
    axes = channel_axes(network).items()
    return {layer: state[name].shape[0] for name, on in axes for axis, layer, each in on if axis == 0 and each == 1}


def draw(small: Mapping[str, int], wide: Mapping[str, int], generator: torch.Generator) -> Key:
    """A key drawn at random, with no regard to any other: ``small`` channels of each layer, in random order."""
    return Key({n: torch.randperm(wide[n], generator=generator)[: small[n]] for n in small}, dict(wide))


def deal(small: Mapping[str, int], wide: Mapping[str, int], index: int) -> Key:
    """The key of block ``index``: keys of different blocks are disjoint, by agreement.

    Raises:
        ValueError: the wide network has fewer than ``index`` + 1 blocks of that size.
    """
    for layer, size in small.items():
        if (index + 1) * size > wide[layer]:
            raise ValueError(
                f"no room for {index + 1} disjoint keys: {size} of the {wide[layer]} channels of '{layer}' each; "
                "use a smaller key_share or sum fewer networks"
            )
    return Key({n: torch.arange(s) + index * s for n, s in small.items()}, dict(wide))


def compact(keys: Sequence[Key]) -> list[Key]:
    """The same keys in a network with as many channels as they may use together, no more.

    A sum under these is the same function with less to compute. Where keys overlap some of its channels are
    nobody's, so that the shapes are the same for all keys of one size: new ones are slow at first.
    """
    positions, sizes = [{} for _ in keys], {}
    for layer in keys[0].sizes:
        used = torch.cat([key.positions[layer] for key in keys]).unique()
        sizes[layer] = min(sum(len(key.positions[layer]) for key in keys), keys[0].sizes[layer])
        for new, key in zip(positions, keys, strict=True):
            new[layer] = torch.searchsorted(used, key.positions[layer])
    return [Key(new, sizes) for new in positions]


def overlap(a: Key, b: Key) -> dict[str, float]:
    """The share of ``a``'s channels that ``b`` uses too, layer by layer."""
    return {n: torch.isin(p, b.positions[n]).float().mean().item() for n, p in a.positions.items()}


def embed(state: Mapping[str, Tensor], axes: Mapping[str, list], key: Key) -> dict[str, Tensor]:
    """A small network's tensors in the wide network, zero where the key leaves channels out; differentiable.

    Args:
        state: parameters or buffers by name.
        axes: the network's :func:`channel_axes`.
        key: where its channels go.
    """
    wide = {}
    for name, tensor in state.items():
        if not axes.get(name):
            wide[name] = tensor
            continue
        shape = list(tensor.shape)
        index = [torch.arange(n, device=tensor.device) for n in shape[:2]]
        for axis, layer, each in axes[name]:
            positions = key.positions[layer].to(tensor.device)
            index[axis] = (positions[:, None] * each + torch.arange(each, device=tensor.device)).flatten()
            shape[axis] = key.sizes[layer] * each
        where = (index[0],) if tensor.ndim == 1 else (index[0][:, None], index[1][None])
        zeros = tensor.new_zeros(shape)
        if tensor.ndim == 4:
            zeros = zeros.contiguous(memory_format=memory_format(key.sizes.values()))
        wide[name] = zeros.index_put(where, tensor)
    return wide
