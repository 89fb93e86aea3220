"""Merging as others do it: the baselines that a plain sum of trained weights is compared with."""

import copy
from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from weightsum_lib.keys import Key, channel_axes, hidden_sizes
from weightsum_lib.weights import WeightSum, widen


class Ensemble(nn.Module):
    """The sum of several networks' logits: what a sum of weights without any interference computes."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        return sum(network(x) for network in self.networks)


def average(networks: Sequence[nn.Module]) -> nn.Module:
    """The plain mean of the weights; its batch-norm statistics are to be re-estimated."""
    return WeightSum(networks, [1 / len(networks)] * len(networks)).materialize().eval()


def task_arithmetic(start: nn.Module, networks: Sequence[nn.Module], scale: float = 1.0) -> nn.Module:
    """start + scale · Σ (θᵢ − start), Ilharco et al. 2023; its batch-norm statistics are to be re-estimated."""
    count = len(networks)
    return WeightSum([start, *networks], [1 - scale * count] + [scale] * count).materialize().eval()


@torch.no_grad()
def weight_matching(a: nn.Module, b: nn.Module, seed: int = 0, sweeps: int = 100) -> nn.Module:
    """Permute the hidden channels of ``b`` to lie near those of ``a``: Git Re-Basin, Ainsworth et al. 2023, Alg. 1.

    One linear assignment a layer, in random order, until no layer changes.

    Args:
        a: the network to come near to.
        b: the network that is permuted; left as it is.
        seed: of the order of the layers.
        sweeps: at most so many rounds over the layers.

    Returns:
        a network that computes the same function as ``b``.
    """
    sizes, axes = hidden_sizes(a), channel_axes(a)
    weights_a, weights_b = ({k: p.double() for k, p in n.named_parameters()} for n in (a, b))
    order = {layer: torch.arange(size) for layer, size in sizes.items()}  # channel of b that takes each place
    generator = torch.Generator().manual_seed(seed)

    def similarity(layer):
        total = 0.0
        for name, wb in weights_b.items():
            for axis, on, each in axes[name]:
                if on != layer:
                    continue
                for other, other_layer, other_each in axes[name]:
                    if other != axis:
                        index = order[other_layer][:, None] * other_each + torch.arange(other_each)
                        wb = wb.index_select(other, index.flatten().to(wb.device))
                rows = [w.movedim(axis, 0).reshape(sizes[layer], each * w.numel() // w.shape[axis])
                        for w in (weights_a[name], wb)]  # fmt: skip
                total = total + rows[0] @ rows[1].T
        return total.cpu()

    for _ in range(sweeps):
        changed = False
        for i in torch.randperm(len(sizes), generator=generator).tolist():
            layer = list(sizes)[i]
            found = torch.from_numpy(linear_sum_assignment(similarity(layer).numpy(), maximize=True)[1])
            changed |= not torch.equal(found, order[layer])
            order[layer] = found
        if not changed:
            break
    return widen(b, Key({layer: channels.argsort() for layer, channels in order.items()}, sizes))


@torch.no_grad()
def regmean(networks: Sequence[nn.Module], inputs: Sequence[Tensor], shrink: float = 0.9) -> nn.Module:
    """RegMean, Jin et al. 2023: in each layer the weights that fit all networks' outputs on their own inputs best.

    W = (Σ Gᵢ)⁻¹ Σ Gᵢ Wᵢ, with Gᵢ the Gram matrix of the layer's inputs (patches, for a convolution) and
    its off-diagonal entries multiplied by ``shrink``. All other parameters are averaged.

    Args:
        networks: in evaluation mode, with batch-norm statistics that fit their inputs.
        inputs: network input (N, C, H, W), without labels, of each network's own task.
        shrink: 1 is the least-squares solution, 0 a mean weighted by each input's power.

    Returns:
        the merged network; its batch-norm statistics are to be re-estimated.
    """
    grams = [_gram_matrices(n, x) for n, x in zip(networks, inputs, strict=True)]
    merged = average(networks)
    for name, layer in merged.named_modules():
        if name not in grams[0]:
            continue
        total, target = 0.0, 0.0
        for network, gram in zip(networks, grams, strict=True):
            g = gram[name] * shrink
            g.diagonal().div_(shrink) if shrink else g.copy_(gram[name].diag().diag())
            g = g / g.diagonal().sum()  # the networks' inputs may differ in scale
            weight = network.get_submodule(name).weight.flatten(1).T.double()
            total, target = total + g, target + g @ weight
        total += torch.eye(len(total), device=total.device) * 1e-6 * total.diagonal().mean()  # dead inputs
        layer.weight.copy_(torch.linalg.solve(total, target).T.reshape(layer.weight.shape))
    return merged


def _gram_matrices(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Layer to the Gram matrix of its inputs, float64 (inputs, inputs)."""
    grams: dict[str, Tensor] = {}

    def record(name):
        def hook(layer, inputs):
            rows = inputs[0].float()
            if isinstance(layer, nn.Conv2d):
                rows = nn.functional.unfold(rows, layer.kernel_size, padding=layer.padding, stride=layer.stride)
                rows = rows.movedim(1, -1).flatten(0, 1)
            grams[name] = grams.get(name, 0) + (rows.T @ rows).double()

        return hook

    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_pre_hook(record(n)) for n, m in layers]
    try:
        for part in x.split(100):
            network(part)
    finally:
        for hook in hooks:
            hook.remove()
    return grams


@torch.no_grad()
def random_like(network: nn.Module, fresh: nn.Module) -> nn.Module:
    """An untrained network whose layers have a trained one's norms: a partner that knows nothing.

    Args:
        network: gives the norm of every parameter tensor.
        fresh: untrained, gives the directions; left as it is. A tensor of zeros stays zeros.
    """
    fresh = copy.deepcopy(fresh)
    wanted: Mapping[str, Tensor] = dict(network.named_parameters())
    for name, p in fresh.named_parameters():
        if p.norm() > 0:
            p *= wanted[name].norm() / p.norm()
    return fresh


@torch.no_grad()
def relabelled(network: nn.Module, permutation: Tensor) -> nn.Module:
    """The network with its classes renamed: class c becomes ``permutation[c]``.

    Training is blind to the classes' names, so this *is* a network trained on the renamed labels, from the start
    with the renamed outputs.
    """
    network = copy.deepcopy(network)
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    last.weight[permutation] = last.weight.clone()
    last.bias[permutation] = last.bias.clone()
    return network
