"""Arithmetic on the weights of networks of one architecture: the sum, and how two networks compare."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm


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

    Raises:
        ValueError: fewer than two networks, another number of coefficients, or parents that differ in
            shape (the first tensor that differs is named, with both shapes).

    >>> a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> x = torch.ones(1, 2)
    >>> torch.allclose(WeightSum([a, b])(x), a(x) + b(x))
    True
    """

    def __init__(self, networks: Sequence[nn.Module], coefficients: Sequence[float] | None = None):
        super().__init__()
        networks = list(networks)
        if len(networks) < 2:
            raise ValueError(f"a sum takes two networks or more, got {len(networks)}")
        coefficients = [1.0] * len(networks) if coefficients is None else [float(c) for c in coefficients]
        if len(coefficients) != len(networks):
            raise ValueError(f"{len(networks)} networks need as many coefficients, got {len(coefficients)}")
        check_same_shapes([n.state_dict() for n in networks])
        self.networks = nn.ModuleList(networks)
        self.coefficients = coefficients
        # The computation and the statistics of the sum. Its weights are given anew at each call, so it keeps none.
        self.body = copy.deepcopy(networks[0])
        for module in self.body.modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()
        for parameter in self.body.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.new_empty(0)
        self.train()  # as any new module, whatever mode its parents are in

    def weights(self) -> dict[str, Tensor]:
        """The summed parameters by name, attached to the parents' graph."""
        return weighted_sum([dict(n.named_parameters()) for n in self.networks], self.coefficients)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the network with the summed weights, e.g. images (N, C, H, W) to logits (N, classes)."""
        return functional_call(self.body, self.weights(), (x,))

    def train(self, mode: bool = True) -> "WeightSum":
        """Switch the sum (not its parents) to training or evaluation mode."""
        self.training = mode
        self.body.train(mode)
        return self

    @torch.no_grad()
    def materialize(self) -> nn.Module:
        """The sum as a plain network of its own, with the sum's batch-norm statistics and mode."""
        network = copy.deepcopy(self.networks[0])
        network.load_state_dict({**self.weights(), **dict(self.body.named_buffers())}, strict=False)
        network.zero_grad(set_to_none=True)
        return network.train(self.training)


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
