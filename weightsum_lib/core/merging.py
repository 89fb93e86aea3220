"""Merging as others do it: the baselines that a plain sum of trained weights is compared with."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightsum_lib.core.keys import Channels, Key, embed, widen
from weightsum_lib.core.weights import WeightSum


def linear_sum_assignment(*arguments, **options):
    """scipy's, imported where it is called: all else in the core needs torch alone."""
    from scipy import optimize

    return optimize.linear_sum_assignment(*arguments, **options)


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
def weight_matching(a: nn.Module, b: nn.Module, channels: Channels, seed: int = 0, sweeps: int = 100) -> nn.Module:
    """Permute the hidden channels of ``b`` to lie near those of ``a``: Git Re-Basin, Ainsworth et al. 2023, Alg. 1.

    One linear assignment a group of channels, in random order, until no group changes.

    Args:
        a: the network to come near to.
        b: the network that is permuted; left as it is.
        channels: of both (:func:`weightsum_lib.hidden_channels`).
        seed: of the order of the groups.
        sweeps: at most so many rounds over the groups.

    Returns:
        a network that computes the same function as ``b``.

    Raises:
        ValueError: a parameter of another shape in ``a`` than in ``b``, or that the channels don't fit; it is named.
    """
    of_a, of_b = ({k: p.double() for k, p in n.named_parameters()} for n in (a, b))
    for name in of_a.keys() | of_b.keys():
        shapes = [tuple(of[name].shape) if name in of else "missing" for of in (of_a, of_b)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"'{name}' is {shapes[0]} in a and {shapes[1]} in b, which must be of one architecture")
    order = {group: torch.arange(size) for group, size in channels.sizes.items()}  # channel of b that takes each place
    generator = torch.Generator().manual_seed(seed)

    def similarity(group: str) -> Tensor:
        """Inner products of each channel of a with each of b, all other groups as they are ordered now."""
        places = {g: o.argsort() for g, o in order.items()} | {group: torch.arange(len(order[group]))}
        total = torch.zeros(len(order[group]), len(order[group]), dtype=torch.float64)
        for name in of_b:
            for axis, its, _ in channels.axes[name]:
                if its == group:
                    # the group's own other axis, where it has two, is as it is ordered now
                    others = Channels({name: tuple(e for e in channels.axes[name] if e[0] != axis)}, channels.sizes)
                    now = places | {group: order[group].argsort()}
                    moved = embed({name: of_b[name]}, Key(others, now, channels.sizes))[name]
                    rows = [w.movedim(axis, 0).reshape(len(order[group]), -1) for w in (of_a[name], moved)]
                    total += (rows[0] @ rows[1].T).cpu()
        return total

    for _ in range(sweeps):
        changed = False
        for i in torch.randperm(len(order), generator=generator).tolist():
            group = list(order)[i]
            found = torch.from_numpy(linear_sum_assignment(similarity(group).numpy(), maximize=True)[1])
            changed |= not torch.equal(found, order[group])
            order[group] = found
        if not changed:
            break
    return widen(b, Key(channels, {group: taken.argsort() for group, taken in order.items()}, channels.sizes))


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

    Raises:
        ValueError: a convolution with groups, dilation or other padding than a number of zeros, whose patches this
            does not gather; it is named.
    """
    grams = [_gram_matrices(n, x) for n, x in zip(networks, inputs, strict=True)]
    merged = average(networks)
    for name in grams[0]:
        total, target = 0.0, 0.0
        for network, gram in zip(networks, grams, strict=True):
            g = gram[name] * shrink
            g.diagonal().copy_(gram[name].diagonal())
            g = g / g.diagonal().sum()  # the networks' inputs may differ in scale
            weight = network.get_submodule(name).weight.flatten(1).T.double()
            total, target = total + g, target + g @ weight
        total += torch.eye(len(total), device=total.device) * 1e-6 * total.diagonal().mean()  # dead inputs
        weight = merged.get_submodule(name).weight
        weight.copy_(torch.linalg.solve(total, target).T.reshape(weight.shape))
    return merged


def _gram_matrices(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Layer to the Gram matrix of its inputs, float64 (inputs, inputs)."""
    grams: dict[str, Tensor] = {}

    def record(name):
        def hook(layer, inputs):
            rows = inputs[0].float()
            if isinstance(layer, nn.Conv2d):
                rows = nn.functional.unfold(rows, layer.kernel_size, padding=layer.padding, stride=layer.stride)
                rows = rows.movedim(1, -1)
            rows = rows.flatten(0, -2)
            grams[name] = grams.get(name, 0) + (rows.T @ rows).double()

        return hook

    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name, layer in layers:
        if isinstance(layer, nn.Conv2d):
            special = layer.groups > 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros"
            if special or isinstance(layer.padding, str):
                raise ValueError(f"RegMean here takes plain convolutions with padding by numbers, '{name}' is {layer}")
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
    for name, p in fresh.named_parameters():
        if p.norm() > 0:
            p *= network.get_parameter(name).norm() / p.norm()
    return fresh


@torch.no_grad()
def relabelled(network: nn.Module, permutation: Tensor) -> nn.Module:
    """The network with its classes renamed: class c becomes ``permutation[c]``.

    Training is blind to the classes' names, so this *is* a network trained on the renamed labels, from the start
    with the renamed outputs.

    Args:
        network: its last linear layer gives the logits; left as it is.
        permutation: (classes,) int64.

    Raises:
        ValueError: something else than each class once.
    """
    network = copy.deepcopy(network)
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    if sorted(permutation.tolist()) != list(range(last.out_features)):
        raise ValueError(f"expected each of the {last.out_features} classes once, got {permutation.tolist()}")
    for tensor in last.parameters():
        tensor[permutation] = tensor.clone()
    return network
