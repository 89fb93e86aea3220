"""Hidden channels of a network: found by following its computation, then proven by permuting and widening them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightsum_lib.core.keys import Channels, Key, tensors_of, widen

# A label (node, each) of a dimension: it runs over the node's channels and has so many entries for each of them.
# Three nodes are not hidden: of dimensions with an order of their own, as input and output have, of constants that
# forward makes, and of those that nothing is known of.
_FIXED, _CONSTANT, _UNKNOWN = (0, 1), (1, 1), (2, 1)
# Operations that only move entries, beside PyTorch's views.
_MOVES = {"_unsafe_view", "repeat", "flip", "roll", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
_LAYERS = {"convolution", *_PRODUCTS}


def hidden_channels(network: nn.Module, example: Tensor) -> Channels:
    """Find which axes of which parameters and buffers run over the same hidden channels, and prove it.

    A copy of the network computes once in evaluation mode, and every operation says which dimensions belong
    together: those that are added or multiplied, and a weight's with what it is applied to. Then ``prove``
    tries what was found.

    Args:
        network: any module that takes one tensor: convolutions (depthwise and transposed too), linear layers, batch
            norms and elementwise functions in any order and with any branches; left as it is.
        example: floating-point input as the network takes it, e.g. images (N, C, H, W); a few do. Only its shape
            is used.

    Raises:
        ValueError: channels can't change places or be more without another function, as under layer norm, group
            norm, grouped convolutions or attention heads; or an operation is unknown. Module and operation are named.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
    >>> channels = hidden_channels(network, torch.zeros(2, 3, 4, 4))
    >>> channels.sizes
    {'0': 8}
    >>> channels.axes["3.weight"]  # (axis, group, entries for each channel)
    ((1, '0', 4),)
    """
    copied, x = _randomized(network, example)
    trace = _Trace(copied, x)
    with torch.no_grad(), trace:
        output = copied(x)
    outputs = [label for tensor in _tensors(output) for label in trace.of(tensor)]
    inner = {trace.find(label)[0] for label in trace.summed}
    outputs += [label for label, *_ in trace.refused[trace.settled :] if trace.find(label)[0] not in inner]
    for root in [trace.find(label)[0] for label in outputs]:
        trace.above[root] = trace.above[root] if root < 3 else _FIXED
    groups: dict[int, str] = {}  # root to name, "" for those that are not hidden
    for node, name in enumerate(trace.names):
        root, _ = trace.find((node, 1))
        if root not in groups:
            module = name.rpartition(".")[0]
            groups[root] = name if module in groups.values() else module
    for label, where, why in trace.refused:
        if group := groups[trace.find(label)[0]]:
            raise ValueError(f"{where} runs over the hidden channels of '{group}': {why}")
    axes, sizes = {}, {group: 0 for group in groups.values() if group}
    for name, tensor in tensors_of(copied, every_name=True).items():
        if isinstance(tensor, nn.Parameter) and tensor.ndim and id(tensor) not in trace.labels:
            raise ValueError(f"parameter '{name}' takes no part in computing the example; remove it")
        labels = [(axis, *trace.find(label)) for axis, label in enumerate(trace.of(tensor))]
        axes[name] = tuple((axis, groups[root], each) for axis, root, each in labels if groups[root])
        sizes |= {group: tensor.shape[axis] // each for axis, group, each in axes[name]}
    channels = Channels(axes, sizes)
    prove(network, channels, example)
    return channels


@torch.no_grad()
def prove(network: nn.Module, channels: Channels, example: Tensor) -> None:
    """Try that channels are what they are said to be, in float64 and with all weights, buffers and input random.

    One group after another, its channels are put in random places among more. The output must stay as it was.
    (Fresh biases and statistics are 0 or 1 and would hide a wrong axis.)

    Args:
        network: left as it is.
        channels: what is said of it.
        example: see :func:`hidden_channels`.

    Raises:
        ValueError: the output is another; the group is named.
    """
    network, x = _randomized(network, example)
    before, generator = _tensors(network(x)), torch.Generator().manual_seed(1)
    if not all(t.isfinite().all() for t in before) or not any(t.any() for t in before):
        raise ValueError("with random weights the network's output is zero or not finite, which proves nothing")
    for group, size in channels.sizes.items():
        own = {name: tuple(entry for entry in its if entry[1] == group) for name, its in channels.axes.items()}
        more = size + 1 + size // 4
        places = torch.randperm(more, generator=generator)[:size]
        places = places if (places.diff() < 0).any() else places.flip(0)  # never in order
        try:
            network = widen(network, Key(Channels(own, {group: size}), {group: places}, {group: more}))
            pairs = zip(_tensors(network(x)), before, strict=True)
            if not all(torch.allclose(after, t, rtol=0, atol=1e-10 * t.abs().max()) for after, t in pairs):
                raise ValueError("the output is another; are they mixed, counted or told apart?")
        except Exception as error:  # whatever a network of other sizes may raise
            what = f"with the hidden channels of '{group}' in other places, among more: {error}"
            raise ValueError(f"{what}; are sizes written into the network's code?") from error


def _randomized(network: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """A float64 copy in evaluation mode with random weights and buffers, on the CPU, and random input for it."""
    if not example.is_floating_point() or not example.numel():
        raise ValueError(f"expected an example of floating-point input, got {example.dtype} {tuple(example.shape)}")
    for name, tensor in tensors_of(network).items():
        if is_lazy(tensor):
            raise ValueError(f"'{name}' has no shape yet; run the network once before its channels are looked for")
    generator = torch.Generator().manual_seed(0)
    network = copy.deepcopy(network).to("cpu", torch.float64).eval()
    for tensor in [t for t in tensors_of(network).values() if t.is_floating_point()]:
        if isinstance(tensor, nn.Parameter):  # of a scale that lets the effect of every layer reach the output
            bound = (6 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 2.0
            tensor.data.uniform_(-bound, bound, generator=generator)
        else:
            tensor.uniform_(0.5, 1.5, generator=generator)  # positive, as variances are
    return network, torch.randn(example.shape, generator=generator, dtype=torch.float64)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Trace(TorchDispatchMode):
    """Labels of tensors' dimensions, tied together by the operations that run while it is active."""

    def __init__(self, network: nn.Module, x: Tensor):
        super().__init__()
        self.weights = {id(tensor): name for name, tensor in tensors_of(network).items()}
        self.above = [_FIXED, _CONSTANT, _UNKNOWN]  # node to the label of the node that it is tied to, or its own
        self.names = ["", "", ""]  # node to the parameter or buffer that it came with
        self.labels = {id(x): [_FIXED] * x.ndim}  # by id of the tensor
        self.kept = [x]  # so that ids stay unique
        self.refused: list[tuple] = []  # (label, where, why)
        self.settled = 0  # so many refusals have layers after them; what follows only turns outputs into others
        self.summed: list[tuple[int, int]] = []  # labels of dimensions that layers sum over
        self.modules: list[str] = []  # that are computing, the innermost last
        self.operation = ""
        for name, module in network.named_modules():
            where = f"'{name}' ({type(module).__name__})" if name else type(module).__name__
            module.register_forward_pre_hook(lambda *_, where=where: self.modules.append(where))
            module.register_forward_hook(lambda *_: self.modules.pop() and None)

    def of(self, tensor: Tensor) -> list[tuple[int, int]]:
        """The labels of a tensor's dimensions."""
        return self.labels.get(id(tensor), [_CONSTANT] * tensor.ndim)

    def find(self, label: tuple[int, int]) -> tuple[int, int]:
        """The label by the one node that stands for all that are tied to it."""
        node, each = label
        while self.above[node][0] != node:
            node, factor = self.above[node]
            each *= factor
        return node, each

    def hidden(self, tensor: Tensor) -> bool:
        """Whether a dimension is of hidden channels, as far as is known."""
        return any(self.find(label)[0] > 2 for label in self.of(tensor))

    def refuse(self, label: tuple[int, int], why: str) -> None:
        """What happens to these channels is an error, unless they turn out to be the network's outputs."""
        if self.find(label)[0] > 2:
            self.refused.append((label, f"{self.modules[-1]}: {self.operation}", why))

    def tie(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        """Two dimensions run over the same channels."""
        a, b = self.find(a), self.find(b)
        if b[0] < 3 or (a[0] > 2 and a[1] < b[1]):
            a, b = b, a
        if b[0] < 3 or a in (b, _UNKNOWN):
            return
        if a == _FIXED:
            if b[0] not in {self.find(label)[0] for label, *_ in self.refused}:  # an error stays one
                self.above[b[0]] = _FIXED
        elif a[0] == 1:
            self.refuse(b, "forward makes a constant for them, which would not follow; make it a buffer")
        elif a[0] == b[0] or a[1] % b[1]:
            self.refuse(a, f"in blocks of {a[1]} entries for each channel and in blocks of {b[1]}")
        else:
            self.above[b[0]] = (a[0], a[1] // b[1])

    def sum_over(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        """Two dimensions are summed over together. What nothing is known of is as long as it is."""
        self.tie(*(_FIXED if self.find(label) == _UNKNOWN else label for label in (a, b)))
        self.summed += [a, b]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Compute, and label the results."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operands, results = _tensors((args, kwargs)), _tensors(out)
        self.operation = func.overloadpacket.__name__
        for t in [t for t in operands if id(t) in self.weights and id(t) not in self.labels]:
            self.labels[id(t)] = [(len(self.above) + axis, 1) for axis in range(t.ndim)]
            self.above += self.labels[id(t)]
            self.names += [self.weights[id(t)]] * t.ndim
        if results and any(id(t) in self.labels for t in operands) and not self.operation.startswith("new_"):
            labels = [[_FIXED] * t.ndim for t in results]
            if self.operation == "expand" or any(self.find(label)[0] for t in operands for label in self.of(t)):
                given = {argument.name: argument.default_value for argument in func._schema.arguments}
                given |= dict(zip(given, args, strict=False)) | kwargs
                labels = self.propagate(func, given, operands, results)
            for t, its in zip(results, labels, strict=False):
                self.labels[id(t)] = its if len(its) == t.ndim else [_UNKNOWN] * t.ndim
            self.kept += results
        if self.operation in _LAYERS or any(id(t) in self.weights for t in operands):
            self.settled = len(self.refused)
        return out

    def propagate(self, func, given: dict[str, Any], operands: list[Tensor], results: list[Tensor]) -> list[list]:
        """The labels of an operation's results, where an operand has hidden channels."""
        name, x, y, labels = self.operation, operands[0], results[0], self.of(operands[0])
        why = "widened, it would run over the empty channels too"
        if name == "convolution":
            return [self.convolved(x, given["weight"], given["bias"], given["transposed"], given["groups"], y)]
        if name in _PRODUCTS:
            *bias, a, b = operands
            self.sum_over(self.of(a)[-1], self.of(b)[-2])
            for one, other in zip(self.of(a)[:-2], self.of(b)[:-2], strict=True):
                self.tie(one, other)
            self.labels[id(y)] = [*self.of(a)[:-1], self.of(b)[-1]]
            return [self.aligned([y, *bias], y)]
        if "batch_norm" in name or "group_norm" in name:
            for t in operands[1:]:
                self.tie(self.of(t)[0], labels[1])
            if "group_norm" in name:
                self.refuse(labels[1], why)
            return [labels]
        if (func.is_view or name in _MOVES) and name not in ("expand", "view_as_real", "view_as_complex"):
            return self.moved(func, given, results)
        others = [t for t in operands[1:] if self.hidden(t)]
        if given.keys() & {"dim", "dims"} and (name == "cat" or not others):  # reductions, softmax, sorting
            dims = given.get("dim", given.get("dims"))
            dims = {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims or range(x.ndim))}
            for t in (x, *others):
                for d, label in enumerate(self.of(t)):
                    self.refuse(label, why) if d in dims else self.tie(labels[d], label)
            kept = [_UNKNOWN if d in dims and x.shape != y.shape else label for d, label in enumerate(labels)]
            return [kept if x.ndim == y.ndim else [kept[d] for d in range(x.ndim) if d not in dims]] * len(results)
        fit = all(t.ndim <= y.ndim for t in operands)
        after = self.aligned(operands, y) if fit else [_UNKNOWN] * y.ndim
        if not fit or (len(results) > 1 and "pool" not in name and "dropout" not in name):  # layer norm, attention
            for label in [label for t in operands for label in self.of(t)]:
                self.refuse(label, why)
        return [after] * len(results)

    def aligned(self, operands: list[Tensor], y: Tensor) -> list[tuple[int, int]]:
        """Elementwise with broadcasting (dimensions are tied from the last one on), or pooling of other dimensions."""
        labels = [_UNKNOWN] * y.ndim
        for t in operands:
            for d, (label, n) in enumerate(zip(self.of(t), t.shape, strict=True), start=y.ndim - t.ndim):
                if n == 1 < y.shape[d]:
                    self.tie(label, _FIXED)
                elif n != y.shape[d]:
                    self.refuse(label, "their number changes")
                    labels[d] = labels[d] if self.find(label)[0] else _FIXED
                elif n > 1 or label != _CONSTANT:
                    self.tie(labels[d], label)
                    labels[d] = label if labels[d] in (_UNKNOWN, _CONSTANT) else labels[d]
        return labels

    def moved(self, func, given: dict[str, Any], results: list[Tensor]) -> list[list]:
        """Views and the like: channel numbers are moved instead of x, to see where they come out, and in what order."""
        x, *options = given.values()
        after = [[_FIXED] * t.ndim for t in results]
        for d, (label, n) in enumerate(zip(self.of(x), x.shape, strict=True)):
            if not self.find(label)[0]:
                continue
            numbers = torch.arange(n).view(-1, *[1] * (x.ndim - d - 1)).expand(x.shape).contiguous()
            for t, its in zip(_tensors(func(numbers, *options)), after, strict=True):
                along = [e for e, m in enumerate(t.shape) if m == n == 1 or (t != t.narrow(e, 0, 1)).any()]
                e, m = (along[0], t.shape[along[0]]) if along else (0, 1)
                in_order = (torch.arange(m) * n // m).view(-1, *[1] * (t.ndim - e - 1))
                if along and m % n == 0 and (t == in_order).all():
                    its[e] = (label[0], label[1] * (m // n))
                elif n == 1:
                    self.tie(label, _FIXED)  # a dimension that goes away
                else:
                    self.refuse(label, "they may be merged with the dimensions after them, but not split or mixed")
                    its[:] = [_UNKNOWN if e in along and it == _FIXED else it for e, it in enumerate(its)]
        return after

    def convolved(self, x, weight, bias, transposed: bool, groups: int, y) -> list[tuple[int, int]]:
        """x (N, C, ...) and weight (out, in / groups, ...), or (in, out / groups, ...) if transposed."""
        (node, each), (first, second, *space) = self.of(x)[1], self.of(weight)
        taken, made = (first, second) if transposed else (second, first)
        if groups == 1:
            self.sum_over(taken, (node, each))
        elif groups == x.shape[1]:
            self.tie(first, (node, each * (len(weight) // groups)))
            made = (node, each * (y.shape[1] // groups))
            space.append(second)
        else:
            for label in ((node, each), first, second):
                self.refuse(label, "of grouped convolutions only depthwise ones can be widened")
        for label in space:
            self.tie(label, _FIXED)
        for label in self.of(x)[2:]:
            self.refuse(label, "a convolution along them tells them apart")
        if bias is not None:
            self.tie(self.of(bias)[0], made)
        return [_FIXED, made, *[_FIXED] * (y.ndim - 2)]
