"""Merging as others do it: the baselines that a plain sum of trained weights is compared with."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from weightsum_lib.core.alike import astray
from weightsum_lib.core.keys import Channels, Key, check_channels, deal, embed, tensors_of, widen, with_tensors
from weightsum_lib.core.weights import WeightSum, check_summable


def _assigned(similarity: Tensor) -> Tensor:
    """The row of each column, so that the sum of their similarities is largest."""
    from scipy import optimize  # here: all else in the core needs torch alone

    return torch.from_numpy(optimize.linear_sum_assignment(similarity.cpu().numpy(), maximize=True)[1]).argsort()


class Ensemble(nn.Module):
    """The sum of several networks' logits: what a sum of weights without any interference computes."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        return sum(network(x) for network in self.networks)


def average(networks: Sequence[nn.Module], *example: Tensor) -> nn.Module:
    """The plain mean of the weights; its batch-norm statistics are to be re-estimated.

    Args:
        networks: of one architecture.
        example: arguments of theirs, needed where a layer of another library may compute its weight.
    """
    return _plain(WeightSum(networks, [1 / len(networks)] * len(networks)), example)


def task_arithmetic(
    start: nn.Module, networks: Sequence[nn.Module], scale: float = 1.0, *, example: Tensor | None = None
) -> nn.Module:
    """start + scale · Σ (θᵢ − start), Ilharco et al. 2023; its batch-norm statistics are to be re-estimated.

    Args:
        start: from which all networks were trained.
        networks: those to merge.
        scale: factor on each difference.
        example: an argument of theirs, see :func:`average`.
    """
    total = WeightSum([start, *networks], [1 - scale * len(networks)] + [scale] * len(networks))
    return _plain(total, () if example is None else (example,))


def _plain(total: WeightSum, example: Sequence[Tensor]) -> nn.Module:
    """A sum as a plain network; on an example it proves that its weights are affine in the parameters."""
    if example:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():  # of statistics that it does not have yet
            total.eval()(*example)
    return total.materialize().eval()


def _vector(tensors: Iterable[Tensor]) -> Tensor:
    """All entries of some tensors, whatever their layout in memory, in float32 at least."""
    return torch.cat([t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])


def _fill(network: nn.Module, vector: Tensor) -> None:
    """Copy the entries of all parameters, each in its own type."""
    for p, part in zip(network.parameters(), vector.split([p.numel() for p in network.parameters()]), strict=True):
        p.copy_(part.view_as(p))


def _copied(network: nn.Module, *alike: nn.Module) -> nn.Module:
    """A copy, whose parameters are all that it computes with; other networks of its architecture must be ``alike``."""
    check_summable([network, *alike])
    if (path := next(astray(network), None)) is not None:
        raise ValueError(f"'{path}' holds weights that are not registered, or in a function; register them")
    return with_tensors(network, tensors_of(network))


def _check_evaluating(networks: Sequence[nn.Module], *inputs: Tensor) -> None:
    for i, network in enumerate(networks):
        if training := [name for name, module in network.named_modules() if module.training]:
            raise ValueError(f"'{training[-1]}' of network {i} is in training mode; call eval() on the network first")
    for x in inputs:
        if not len(x) or not x.isfinite().all():
            raise ValueError(f"expected one image or more, of finite numbers; got {tuple(x.shape)}, NaN or infinity")


def _is_tied(network: nn.Module, weight: Tensor) -> bool:
    return sum(p is weight for module in network.modules() for p in module._parameters.values()) > 1


def _output(network: nn.Module, example: Tensor) -> Tensor:
    """What a network answers, a tensor that says something; else an error."""
    found = network(example)
    if not isinstance(found, Tensor) or not found.any():
        raise ValueError(f"expected one tensor that is not zero for the example, got a {type(found).__name__}")
    return found


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are different, beyond rounding."""
    return not torch.allclose(a, b, rtol=0, atol=torch.finfo(b.dtype).eps ** 0.5 * b.abs().max().item())


@torch.no_grad()
def ties(start: nn.Module, networks: Sequence[nn.Module], scale: float = 1.0, keep: float = 0.2) -> nn.Module:
    """TIES-merging, Yadav et al. 2023: trim, elect a sign, and average the differences that have it.

    Args:
        start: from which all networks were trained.
        networks: those to merge.
        scale: factor on the merged difference.
        keep: share of each network's differences that is not trimmed, the largest.

    Returns:
        the merged network; its batch-norm statistics are to be re-estimated.

    Raises:
        ValueError: networks of different architectures, what differs is named; a share or scale that is none.
    """
    if not (0 < keep <= 1 and abs(scale) < torch.inf):
        raise ValueError(f"expected a share above 0, at most 1, and a finite scale, got keep={keep}, scale={scale}")
    merged = _copied(start, *networks).eval()
    origin, *ends = (_vector(n.parameters()) for n in (start, *networks))
    found = torch.stack(ends) - origin
    smallest = found.abs().sort(descending=True).values[:, [max(1, round(keep * len(origin))) - 1]]
    found *= found.abs() >= smallest
    found *= found.sign() == found.sum(0).sign()
    _fill(merged, origin + scale * found.sum(0) / (found != 0).sum(0).clamp(min=1))
    return merged


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
    check_channels(b, channels)
    of_a, of_b = ({k: p.double() for k, p in n.named_parameters()} for n in (a, b))
    for name in of_a.keys() | of_b.keys():
        shapes = [tuple(of[name].shape) if name in of else "missing" for of in (of_a, of_b)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"'{name}' is {shapes[0]} in a and {shapes[1]} in b, which must be of one architecture")
    places = {group: torch.arange(size) for group, size in channels.sizes.items()}  # of b's channels, among those of a
    generator = torch.Generator().manual_seed(int(seed))

    def similarity(group: str) -> Tensor:
        """Inner products of each channel of a with each of b, all other groups as they are placed now."""
        now = Key(channels, places, channels.sizes)
        total = torch.zeros(channels.sizes[group], channels.sizes[group], dtype=torch.float64)
        for name, axis in [(n, axis) for n in of_b for axis, its, _ in channels.axes[n] if its == group]:
            moved = embed({name: of_b[name]}, now)[name]
            rows = [w.movedim(axis, 0).reshape(len(total), -1) for w in (of_a[name], moved)]
            total += (rows[0] @ rows[1][places[group]].T).cpu()  # this axis back in the order of b
        return total

    for _ in range(sweeps):
        before = dict(places)
        for i in torch.randperm(len(places), generator=generator).tolist():
            group = list(places)[i]
            places[group] = _assigned(similarity(group))
        if all(torch.equal(its, before[group]) for group, its in places.items()):
            break
    return widen(b, Key(channels, places, channels.sizes))


@torch.no_grad()
def activation_matching(a: nn.Module, b: nn.Module, channels: Channels, x: Tensor) -> nn.Module:
    """Permute the hidden channels of ``b`` to compute what those of ``a`` do, Li et al. 2016: one assignment a group.

    Args:
        a: the network to come near to, in evaluation mode.
        b: the network that is permuted, in evaluation mode; left as it is.
        channels: of both (:func:`weightsum_lib.hidden_channels`).
        x: network input (N, C, H, W), without labels.

    Returns:
        a network that computes the same function as ``b``.

    Raises:
        ValueError: see :func:`correlations`.
    """
    found = correlations([a, b], channels, x)
    places = {group: _assigned(c[: len(c) // 2, len(c) // 2 :]) for group, c in found.items()}
    return widen(b, Key(channels, places, channels.sizes))


@torch.no_grad()
def correlations(networks: Sequence[nn.Module], channels: Channels, x: Tensor) -> dict[str, Tensor]:
    """How the hidden channels of some networks correlate, as the last layer that reads them finds them.

    Args:
        networks: of one architecture, in evaluation mode.
        channels: of each.
        x: network input (N, C, H, W), without labels.

    Returns:
        group to correlations, float32 (channels of all networks, the same). Channels that never
        change are alike, and like no other.

    Raises:
        ValueError: a group that no convolution or linear layer reads, or weights of other layers, as transposed
            convolutions; a network in training mode. It is named. Images that are not finite.
    """
    _check_evaluating(networks, x)
    readers = _readers(networks[0], channels)
    if unread := channels.sizes.keys() - {group for group, _ in readers.values()}:
        raise ValueError(f"no convolution or linear layer reads the channels of '{min(unread)}' to compare them")
    n, read = len(networks), {}
    total = {g: x.new_zeros(n * each + 1, n * each + 1, dtype=torch.float64) for g, each in channels.sizes.items()}

    def record(number, group, each, layer, inputs):  # (N, C, H, W), or (N, ..., C · each) of a linear layer
        rows = inputs[0].movedim(1 if isinstance(layer, _ConvNd) else -1, -1).unflatten(-1, (-1, each))
        read[number, group] = rows.transpose(-1, -2).flatten(0, -2).double()

    with ExitStack() as hooks:
        for number, network in enumerate(networks):
            for name, of in readers.items():
                hooks.enter_context(network.get_submodule(name).register_forward_pre_hook(partial(record, number, *of)))
        for part in x.split(100):
            for network in networks:
                network(part)
            for group in total:
                rows = [read[number, group] for number in range(n)]
                rows = torch.cat([*rows, torch.ones_like(rows[0][:, :1])], 1)  # for their sums and their number
                total[group].addmm_(rows.T, rows)
    for group, moments in total.items():
        mean, like = moments[:-1, -1] / moments[-1, -1], moments[:-1, :-1]  # in place: they may be large
        like.div_(moments[-1, -1]).addr_(mean, mean, alpha=-1)
        spread = like.diagonal().clamp(min=0).sqrt()
        still = spread <= 1e-6 * spread.max()
        total[group] = like.div_(spread).div_(spread[:, None]).float()
        total[group][still], total[group][:, still] = 0, still.float()[:, None]
    return total


def _readers(network: nn.Module, channels: Channels) -> dict[str, tuple[str, int]]:
    """The convolutions and linear layers that read hidden channels: name to the group and the entries for each."""
    found, tensors = {}, tensors_of(network, every_name=True)
    for name, axes in ((n, axes) for n, axes in channels.axes.items() if axes and tensors[n].ndim > 1):
        layer = network.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, nn.Linear | _ConvNd) or isinstance(layer, _ConvTransposeNd):
            raise ValueError(f"'{name}' belongs to a {type(layer).__name__}; expected convolutions and linear layers")
        if axes[-1][0] == 1:
            found[name.rpartition(".")[0]] = axes[-1][1:]
    return found


@torch.no_grad()
def fold(networks: Sequence[nn.Module], channels: Channels, onto: Mapping[str, Tensor], example: Tensor) -> nn.Module:
    """The networks side by side, their logits added, some of their channels merged: W = M (W₁ ⊕ W₂ ⊕ …) U.

    Args:
        networks: of one architecture, in evaluation mode.
        channels: of each.
        onto: for each group that is merged M, (merged channels, channels of all networks): a row has the weights with
            which channels make one, each channel in one row. U gives each channel the one that it has become. Groups
            that are not there stay apart; without any it is the ensemble of the networks.
        example: some network input (N, C, H, W), on which that is proven.

    Returns:
        one network; its batch-norm statistics are to be re-estimated.

    Raises:
        ValueError: a channel that is in no row or in several; weights of other layers than convolutions (which are not
            transposed) and linear ones; the group or weight is named. Networks that side by side don't compute the sum
            of their outputs, as with a batch norm of the input.
    """
    _check_evaluating(networks, example)
    keys = [deal(channels, float(len(networks)), i) for i in range(len(networks))]
    side = WeightSum(networks, keys=keys).add_statistics().eval()
    for group, matrix in onto.items():
        if matrix.shape[1] != keys[0].sizes[group] or not ((matrix != 0).sum(0) == 1).all():
            what = f"each of the {keys[0].sizes[group]} channels of '{group}'"
            raise ValueError(f"a merge has {what} in one row of its matrix, got one of {tuple(matrix.shape)}")
    _readers(networks[0], channels)  # their first axis is what they compute, the second what they read
    with warnings.catch_warnings(action="ignore"):  # of statistics that no network has
        differ = _differ(side(example), sum(_output(network, example) for network in networks))
    if differ:
        why = "something but the last layer acts on channels of no group, as a scalar, a gate or a softmax"
        raise ValueError(f"side by side the networks don't compute the sum of their outputs: {why}")
    side = side.materialize()
    tensors = tensors_of(side)
    for name in tensors:
        for axis, group, each in [entry for entry in channels.axes[name] if entry[1] in onto]:
            rows = tensors[name].movedim(axis, -1).unflatten(-1, (-1, each)).mT
            matrix = (onto[group] != 0 if axis else onto[group]).to(rows)
            tensors[name] = (rows @ matrix.T).mT.flatten(-2).movedim(-1, axis)
    return with_tensors(side, tensors)


def zipped(correlation: Tensor, alpha: float = 1e-4, beta: float = 0.075) -> Tensor:
    """ZipIt!, Stoica et al. 2024: pairs of the most alike channels of two networks, in one or across, are averaged.

    Args:
        correlation: of all channels of two networks (2n, 2n), see :func:`correlations`.
        alpha: factor on the correlation of what is merged already; it is the least of its channels' before. Small:
            pairs, no larger groups.
        beta: share of the merges that may be within a network, half of it in each, and at least one.

    Returns:
        M of :func:`fold`, (n, 2n).

    Raises:
        ValueError: correlations that are not those of two networks' channels, or not finite.
    """
    if correlation.shape != 2 * (len(correlation) // 2 * 2,) or not correlation.isfinite().all():
        raise ValueError(f"expected finite correlations (2n, 2n) of two networks, got {tuple(correlation.shape)}")
    like, n = correlation.clone().fill_diagonal_(-torch.inf), len(correlation) // 2
    of, budget = torch.arange(2 * n, device=like.device), [int(beta * n / 2)] * 2  # the channel that each is now
    best, nearest = like.max(1)
    for _ in range(n):
        i = int(best.argmax())
        i, j = sorted((i, int(nearest[i])))
        of[of == j] = i
        like[i] = alpha * torch.minimum(like[i], like[j])
        like[:, i] = like[i]
        like[j], like[:, j], like[i, i] = -torch.inf, -torch.inf, -torch.inf
        stale = (nearest == i) | (nearest == j) | (like[i] > best)
        stale[[i, j]] = True
        if (i < n) == (j < n):
            budget[i // n] -= 1
            if budget[i // n] <= 0:
                own = slice(n) if i < n else slice(n, 2 * n)
                like[own, own], stale[own] = -torch.inf, True
        best[stale], nearest[stale] = like[stale].max(1)
    return torch.nn.functional.normalize((of == of.unique()[:, None]).to(like), p=1)


@torch.no_grad()
def random_signs(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """The network as it lies in a superposition (Cheung et al. 2019) from which another one is retrieved.

    Stored is Σ Wᵢ diag(sᵢ), layer by layer, with random signs sᵢ of each layer's inputs. With the key sⱼ, for which one
    has to know the task, Wⱼ + Σ Wᵢ diag(sᵢ sⱼ) is retrieved: the others have random signs.

    Args:
        network: left as it is.
        generator: of the signs, on the CPU.

    Raises:
        ValueError: a network with hooks, parametrizations, or weights that are not its parameters; it is named.
    """
    network = _copied(network)
    layers = {id(m.weight): m for m in network.modules() if isinstance(m, _ConvNd | nn.Embedding)}
    for weight in [p for p in network.parameters() if p.ndim > 1]:
        layer = layers.get(id(weight))
        axis = 0 if isinstance(layer, _ConvTransposeNd | nn.Embedding) else 1  # of the inputs
        for group in weight.chunk(getattr(layer, "groups", 1) if axis else 1):  # which read inputs of their own
            signs = 2 * torch.randint(2, (group.shape[axis],), generator=generator) - 1
            group *= signs.to(weight).view(-1, *[1] * (weight.ndim - 1 - axis))
    return network


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
            does not gather; a layer whose weight is another's too; a network in training mode. It is named. Images
            that are not finite.
    """
    _check_evaluating(networks, *inputs)
    grams = [_gram_matrices(n, x) for n, x in zip(networks, inputs, strict=True)]
    merged = average(networks, inputs[0][:2])
    for name in grams[0]:
        total, target = 0.0, 0.0
        for network, gram in zip(networks, grams, strict=True):
            g = shrink * gram[name] + (1 - shrink) * gram[name].diagonal().diag()
            g = g / g.trace().clamp(min=1e-30)  # the networks' inputs may differ in scale, or be 0 in one
            weight = network.get_submodule(name).weight.flatten(1).T.double()
            total, target = total + g, target + g @ weight
        total += torch.eye(len(total), device=total.device) * 1e-6 * total.diagonal().mean()  # dead inputs
        weight = merged.get_submodule(name).weight
        weight.copy_(torch.linalg.solve(total, target).T.reshape(weight.shape))
    return merged


def _gram_matrices(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Layer to the Gram matrix of its inputs, float64 (inputs, inputs)."""
    names = {m: n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    grams: dict[str, Tensor] = {}

    def record(layer, inputs):
        rows = inputs[0].float()
        if isinstance(layer, nn.Conv2d):
            rows = nn.functional.unfold(rows, layer.kernel_size, padding=layer.padding, stride=layer.stride)
            rows = rows.movedim(1, -1)
        rows = rows.flatten(0, -2)
        grams[names[layer]] = grams.get(names[layer], 0) + (rows.T @ rows).double()

    with ExitStack() as hooks:
        for layer, name in names.items():
            if _is_tied(network, layer.weight):
                raise ValueError(f"'{name}' has the weight of another layer: no one input is to be fitted")
            if isinstance(layer, nn.Conv2d):
                kind = (layer.groups, layer.dilation, layer.padding_mode, type(layer.padding))
                if kind != (1, (1, 1), "zeros", tuple):
                    raise ValueError(f"RegMean here takes plain convolutions, padded by numbers; '{name}' is {layer}")
            hooks.enter_context(layer.register_forward_pre_hook(record))
        for part in x.split(100):
            network(part)
    return grams


@torch.no_grad()
def fisher_average(
    networks: Sequence[nn.Module],
    fishers: Sequence[Tensor],
    coefficients: Sequence[float] | None = None,
    *,
    example: Tensor | None = None,
) -> nn.Module:
    """Fisher-weighted averaging, Matena and Raffel 2022: each weight counts as much as its network's output feels it.

    θ = Σ λᵢ Fᵢ θᵢ / Σ λᵢ Fᵢ.

    Args:
        networks: of one architecture.
        fishers: Fᵢ, the :func:`fisher_information` of each.
        coefficients: λᵢ; by default equal.
        example: an argument of theirs, see :func:`average`.

    Returns:
        the merged network; its batch-norm statistics are to be re-estimated.

    Raises:
        ValueError: another number of fishers or coefficients than of networks, or weights that give no mean.
    """
    merged = average(networks, *(() if example is None else (example,)))
    own = torch.stack([_vector(n.parameters()) for n in networks])
    factors = [1.0] * len(own) if coefficients is None else coefficients
    weights = torch.stack([c * f for c, f, _ in zip(factors, fishers, own, strict=True)])
    if weights.shape != own.shape or not (weights.sum(0) > 0).all() or not weights.isfinite().all():
        raise ValueError(f"expected {len(own[0])} numbers a network whose sum, weighted by coefficients, is positive")
    _fill(merged, (weights * own).sum(0) / weights.sum(0))
    return merged


@torch.enable_grad()
def fisher_information(network: nn.Module, x: Tensor) -> Tensor:
    """The diagonal of the Fisher information, the mean over images of Σ_c p_c (∇ log p_c)², of norm 1.

    Entries are at least 1e-6 before that (in the authors' code those of one network of two).

    Args:
        network: in evaluation mode, with batch-norm statistics that fit ``x``.
        x: network input (N, C, H, W), without labels; each image takes a gradient for each class.

    Returns:
        (parameters,), in the order of ``network.parameters()``.

    Raises:
        ValueError: a parameter that requires no gradient, a network in training mode; it is named. Images that are not
            finite.
    """
    _check_evaluating([network], x)
    parameters = dict(network.named_parameters())
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters.values()]
    if frozen := [name for name, p in parameters.items() if not p.requires_grad]:
        raise ValueError(f"'{frozen[0]}' requires no gradient, so nothing says how much it is felt; unfreeze it")
    for image in x.split(1):
        likely = network(image)[0].log_softmax(0)
        for log in likely:
            felt = torch.autograd.grad(log, [*parameters.values()], retain_graph=True, materialize_grads=True)
            for t, g in zip(total, felt, strict=True):
                t.addcmul_(g.to(t), g.to(t), value=log.exp().item() / len(x))
    total = _vector(total).clamp(min=1e-6)
    return total / total.norm()


@torch.no_grad()
def random_like(network: nn.Module, fresh: nn.Module) -> nn.Module:
    """An untrained network whose layers have a trained one's norms: a partner that knows nothing.

    Args:
        network: gives the norm of every parameter tensor.
        fresh: untrained, gives the directions; left as it is. A tensor of zeros stays zeros.

    Raises:
        ValueError: ``fresh`` has hooks, parametrizations, or weights that are not its parameters; it is named.
    """
    fresh = _copied(fresh)
    for name, p in fresh.named_parameters():
        if p.norm() > 0:
            p *= network.get_parameter(name).norm() / p.norm()
    return fresh


@torch.no_grad()
def relabelled(network: nn.Module, permutation: Tensor, example: Tensor) -> nn.Module:
    """The network with its classes renamed: class c becomes ``permutation[c]``.

    Training is blind to the classes' names, so this *is* a network trained on the renamed labels, from the start
    with the renamed outputs.

    Args:
        network: its last linear layer gives the logits; in evaluation mode, left as it is.
        permutation: (classes,) int64.
        example: some network input (N, C, H, W), on which it is proven.

    Raises:
        ValueError: something else than each class once; no last linear layer, or one whose weight is not its own; the
            outputs are not those of that layer.
    """
    _check_evaluating([network], example)
    renamed = _copied(network)
    *_, last = None, *(m for m in renamed.modules() if isinstance(m, nn.Linear))
    if last is None or _is_tied(renamed, last.weight):
        raise ValueError("expected a last linear layer, whose weight is its own")
    if sorted(permutation.tolist()) != list(range(last.out_features)):
        raise ValueError(f"expected each of the {last.out_features} classes once, got {permutation.tolist()}")
    for tensor in last.parameters():
        tensor[permutation] = tensor.clone()
    before, after = _output(network, example), renamed(example)
    if after.shape[-1] != last.out_features or _differ(after[..., permutation], before):
        raise ValueError("the network's outputs are not those of the linear layer that it has registered last")
    return renamed
