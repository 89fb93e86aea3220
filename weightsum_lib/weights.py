"""Arithmetic on the weights of networks of one architecture: the sum, and how two networks compare."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib.keys import Key, channel_axes, embed


def check_same_shapes(parents: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise ValueError unless all state dicts hold the same tensors, naming the first that differs."""
    first = parents[0]
    for i, other in enumerate(parents[1:], start=1):
        for name in [*first, *(n for n in other if n not in first)]:
            shapes = [tuple(p[name].shape) if name in p else "missing" for p in (first, other)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"networks 0 and {i} can't be summed: '{name}' is {shapes[0]} in network 0 and "
                    f"{shapes[1]} in network {i}; a sum of weights needs one architecture and one width"
                )


def weighted_sum(parents: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Σ cᵢ·θᵢ, tensor by tensor, differentiable.

    >>> weighted_sum([{"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}], [1.0, 0.5])
    {'w': tensor([2.5000, 2.5000])}
    """
    total = {}
    for name in parents[0]:
        terms = [p[name] if c == 1 else p[name] * c for p, c in zip(parents, coefficients, strict=True)]
        total[name] = sum(terms[1:], start=terms[0])
    return total


class WeightSum(nn.Module):
    """The network whose weights are Σ cᵢ·θᵢ.

    Its ``forward`` is that of one plain network; gradients flow through the sum to every parent.
    Its parameters are its parents' parameters. Batch-norm statistics are its own: a sum has none to
    inherit, so they start at (0, 1); train it, or see :func:`~weightsum_lib.recalibrate`.
    ``train()`` and ``eval()`` switch the sum only, never a parent.

    Args:
        networks: two or more modules of one architecture.
        coefficients: one number a network; all ones by default.
        keys: one :class:`~weightsum_lib.keys.Key` a network, all for a wide network of the same sizes: each
            network's channels are put where its key says before the weights are added. Without keys channel i
            is added to channel i.

    Raises:
        ValueError: fewer than two networks, another number of coefficients or keys, or parents that differ
            in shape (the first tensor that differs is named, with both shapes).

    >>> a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> x = torch.ones(1, 2)
    >>> torch.allclose(WeightSum([a, b])(x), a(x) + b(x))
    True
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        coefficients: Sequence[float] | None = None,
        keys: Sequence[Key] | None = None,
    ):
        super().__init__()
        networks = list(networks)
        if len(networks) < 2:
            raise ValueError(f"a sum takes two networks or more, got {len(networks)}")
        coefficients = [1.0] * len(networks) if coefficients is None else [float(c) for c in coefficients]
        for what, given in (("coefficients", coefficients), ("keys", keys)):
            if given is not None and len(given) != len(networks):
                raise ValueError(f"{len(networks)} networks need as many {what}, got {len(given)}")
        check_same_shapes([n.state_dict() for n in networks])
        self.networks = nn.ModuleList(networks)
        self.coefficients = coefficients
        # The computation and the statistics of the sum. Its weights are given anew at each call, so it keeps none.
        self.body = copy.deepcopy(networks[0])
        for parameter in self.body.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.new_empty(0)
        self._axes = channel_axes(networks[0]) if keys else {}
        self.use_keys(keys)
        self.train()  # as any new module, whatever mode its parents are in

    def use_keys(self, keys: Sequence[Key] | None) -> None:
        """Put the networks' channels elsewhere; the sum's statistics, which are of its channels, start anew."""
        for key in keys or ():
            if key.sizes != keys[0].sizes:
                raise ValueError(f"keys of one sum are for one wide network, got {keys[0].sizes} and {key.sizes}")
        device = next(self.networks.parameters()).device
        self.keys = [key.to(device) for key in keys] if keys else None  # once, not for each tensor of each step
        for name, module in self.body.named_modules():
            if isinstance(module, _BatchNorm):
                if keys:
                    ((_, layer, _),) = self._axes[f"{name}.running_mean"]
                    module.running_mean = module.running_mean.new_empty(keys[0].sizes[layer])
                    module.running_var = module.running_mean.new_empty(keys[0].sizes[layer])
                module.reset_running_stats()

    def _summed(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if self.keys:
            parts = [embed(part, self._axes, key) for part, key in zip(parts, self.keys, strict=True)]
        return weighted_sum(parts, self.coefficients)

    def weights(self, held: Sequence[int] = ()) -> dict[str, Tensor]:
        """The summed parameters by name, attached to the graph of every parent but those ``held`` (by number)."""
        parts = [dict(n.named_parameters()) for n in self.networks]
        for i in held:
            parts[i] = {name: p.detach() for name, p in parts[i].items()}
        return self._summed(parts)

    def forward(self, x: Tensor, held: Sequence[int] = ()) -> Tensor:
        """The output of the network with the summed weights, e.g. images (N, C, H, W) to logits (N, classes).

        No gradient goes to the parents ``held`` (by number).
        """
        return functional_call(self.body, self.weights(held), (x,))

    def train(self, mode: bool = True) -> "WeightSum":
        """Switch the sum (not its parents) to training or evaluation mode."""
        self.training = mode
        self.body.train(mode)
        return self

    @torch.no_grad()
    def add_statistics(self) -> "WeightSum":
        """Give the sum the sum of its parents' batch-norm statistics: state dicts added, buffers included.

        With disjoint keys that gives each channel its owner's statistics. Otherwise it is wrong.
        """
        parts = [{k: v for k, v in n.named_buffers() if v.ndim} for n in self.networks]
        for name, value in self._summed(parts).items():
            self.body.get_buffer(name).copy_(value)
        return self

    @torch.no_grad()
    def materialize(self) -> nn.Module:
        """The sum as a plain network of its own, with the sum's batch-norm statistics and mode."""
        return _with_tensors(self.body, {**self.weights(), **dict(self.body.named_buffers())}).train(self.training)


def _with_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network that holds other tensors, of other sizes perhaps."""
    network = copy.deepcopy(network).requires_grad_(True)
    network.zero_grad(set_to_none=True)
    for name, _ in network.named_parameters():
        network.get_parameter(name).data = tensors[name].detach().clone()
    for name, _ in network.named_buffers():
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, tensors[name].detach().clone())
    for module in network.modules():  # what a layer says of itself follows its weights
        if isinstance(module, _BatchNorm):
            module.num_features = len(module.weight)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
    return network


def widen(network: nn.Module, key: Key) -> nn.Module:
    """The wide network that holds a small one where the key says and zeros elsewhere; the same function.

    Args:
        network: see :func:`~weightsum_lib.keys.channel_axes`.
        key: where its hidden channels go.
    """
    return _with_tensors(network, embed(network.state_dict(), channel_axes(network), key))


@torch.no_grad()
def compare_layers(a: nn.Module, b: nn.Module) -> list[dict]:
    """How the weights of two networks compare, layer by layer.

    Batch norm hides the scale of the layer before it, so a sum can "survive" because one network is
    simply larger: look at the norm ratio before believing a small gap.

    Returns:
        a list with one dict for each convolution and linear layer; keys ``layer``, ``norm_ratio``
        = ‖W_a‖ / ‖W_b‖ (Frobenius), and ``cosine`` of the angle between the flattened weights.
    """
    rows, layers_b = [], dict(b.named_modules())
    for name, module in a.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            wa, wb = module.weight.flatten().double(), layers_b[name].weight.flatten().double()
            norm_a, norm_b = wa.norm().item(), wb.norm().item()
            rows.append(
                {
                    "layer": name.rpartition(".")[2],
                    "norm_ratio": norm_a / norm_b,
                    "cosine": (wa @ wb).item() / (norm_a * norm_b),
                }
            )
    return rows
