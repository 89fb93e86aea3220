"""Hidden channels of a network: found by following its computation, then proven by permuting and widening them."""

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from weightsum_lib.core.keys import Channels, Key, tensors_in, tensors_of, widen, with_tensors

# A label (node, each) of a dimension: it runs over the node's channels and has so many entries for each of them. A
# node is an axis of a parameter or buffer, by name. Three have no name and are not hidden: of dimensions with an order
# of their own, as input and output have, of constants that forward makes, and of those that nothing is known of.
_FIXED, _CONSTANT, _UNKNOWN = (("", 0), 1), (("", 1), 1), (("", 2), 1)
# Operations that only move entries, beside PyTorch's views.
_MOVES = {"_unsafe_view", "repeat", "flip", "roll", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
_WIDENED = "widened, it would run over the empty channels too"


@torch.inference_mode(False)
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
    try:
        with torch.no_grad(), trace:
            output = copied(x)
    except RuntimeError as error:
        raise ValueError(f"the network does not compute a random example in float64, on the CPU: {error}") from error
    others = [leaf for leaf in tree_leaves(output) if not isinstance(leaf, Tensor)]
    if odd := [leaf for leaf in others if is_dataclass(leaf) or hasattr(leaf, "__dict__")]:
        what = f"the network returns a {type(odd[0]).__name__}, in which no tensor is looked for"
        raise ValueError(f"{what}; return tensors, or tuples, lists or dictionaries of them")
    outputs = [label for tensor in tensors_in(output) for label in trace.of(tensor)]
    inner = {trace.find(label)[0] for label in trace.summed}
    outputs += [label for label, *_ in trace.refused[trace.settled :] if trace.find(label)[0] not in inner]
    ends = [trace.find(label)[0] for label in (_FIXED, _CONSTANT, _UNKNOWN, *outputs)]
    groups = dict.fromkeys(ends, "")  # root to name, "" for those that are not hidden
    for node, (root, _) in trace.roots.items():
        if root not in groups:
            module = node[0].rpartition(".")[0]
            groups[root] = node[0] if module in groups.values() else module
    for label, where, why in trace.refused:
        if group := groups[trace.find(label)[0]]:
            raise ValueError(f"{where} runs over the hidden channels of '{group}': {why}")
    axes, sizes = {}, {group: 0 for group in groups.values() if group}
    for name, tensor in tensors_of(copied, every_name=True).items():
        if isinstance(tensor, nn.Parameter) and tensor.ndim and tensor not in trace.labels:
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
    before, generator = tensors_in(network(x)), torch.Generator().manual_seed(1)
    if not all(t.isfinite().all() for t in before) or not any(t.any() for t in before):
        raise ValueError("with random weights the network's output is zero or not finite, which proves nothing")
    for group, size in channels.sizes.items():
        own = {name: tuple(entry for entry in its if entry[1] == group) for name, its in channels.axes.items()}
        more = size + 1 + size // 4
        places = torch.randperm(more, generator=generator)[:size]
        places = places if (places.diff() < 0).any() else places.flip(0)  # never in order
        try:
            network = widen(network, Key(Channels(own, {group: size}), {group: places}, {group: more}))
            pairs = zip(tensors_in(network(x)), before, strict=True)
            if not all(torch.allclose(after, t, rtol=0, atol=1e-10 * t.abs().max()) for after, t in pairs):
                raise ValueError("the output is another; are they mixed, counted or told apart?")
        except Exception as error:  # whatever a network of other sizes may raise
            what = f"with the hidden channels of '{group}' in other places, among more: {error}"
            raise ValueError(f"{what}; are sizes written into the network's code?") from error


def _randomized(network: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """A float64 copy in evaluation mode with random weights and buffers, on the CPU, and random input for it."""
    if not example.is_floating_point() or not example.numel():
        raise ValueError(f"expected an example of floating-point input, got {example.dtype} {tuple(example.shape)}")
    if lazy := [name for name, tensor in tensors_of(network).items() if nn.parameter.is_lazy(tensor)]:
        raise ValueError(f"'{lazy[0]}' has no shape yet; run the network once before its channels are looked for")
    if odd := [name for name, t in tensors_of(network).items() if t.is_meta or t.is_complex()]:
        raise ValueError(f"'{odd[0]}' is complex or on the meta device; give a network of real numbers that has values")
    generator = torch.Generator().manual_seed(0)
    network = with_tensors(network, tensors_of(network)).to("cpu", torch.float64).eval()
    for tensor in [t for t in tensors_of(network).values() if t.is_floating_point()]:
        # parameters of a scale that lets the effect of every layer reach the output, buffers positive as variances are
        bound = (6 / max(1, tensor[:1].numel())) ** 0.5 if tensor.ndim > 1 else 2.0
        span = (-bound, bound) if isinstance(tensor, nn.Parameter) else (0.5, 1.5)
        tensor.data.uniform_(*span, generator=generator)
    return network, torch.randn(example.shape, generator=generator, dtype=torch.float64)


class _Trace(TorchDispatchMode):
    """Labels of tensors' dimensions, tied together by the operations that run while it is active."""

    def __init__(self, network: nn.Module, x: Tensor):
        super().__init__()
        self.weights = {id(tensor): name for name, tensor in tensors_of(network).items()}
        self.roots = {node: (node, each) for node, each in (_FIXED, _CONSTANT, _UNKNOWN)}  # node to what it is tied to
        self.labels = WeakTensorKeyDictionary({x: [_FIXED] * x.ndim})
        self.refused: list[tuple] = []  # (label, where, why)
        self.settled = 0  # so many refusals have layers after them; what follows only turns outputs into others
        self.summed: list[tuple] = []  # labels of dimensions that layers sum over
        self.modules: list[str] = []  # that are computing, the innermost last
        self.operation = ""
        for name, module in network.named_modules():
            where = f"'{name}' ({type(module).__name__})" if name else type(module).__name__
            module.register_forward_pre_hook(lambda *_, where=where: self.modules.append(where))
            module.register_forward_hook(lambda *_: self.modules.pop() and None)

    def of(self, tensor: Tensor) -> list[tuple]:
        """The labels of a tensor's dimensions."""
        return self.labels.get(tensor, [_CONSTANT] * tensor.ndim)

    def find(self, label: tuple) -> tuple:
        """The label by the one node that stands for all that are tied to it."""
        root, each = self.roots[label[0]]
        return root, each * label[1] if root[0] else 1

    def hidden(self, label: tuple) -> bool:
        """Whether a dimension is of hidden channels, as far as is known."""
        return self.find(label)[0][0] != ""

    def refuse(self, labels: list[tuple], why: str) -> None:
        """What happens to these channels is an error, unless they turn out to be the network's outputs."""
        hidden = [label for label in labels if self.hidden(label)]
        self.refused += [(label, f"{self.modules[-1]}: {self.operation}", why) for label in hidden]

    def tie(self, a: tuple, b: tuple) -> None:
        """Two dimensions run over the same channels."""
        a, b = sorted(map(self.find, (a, b)), key=lambda label: (self.hidden(label), -label[1]))
        if not self.hidden(b) or a in (b, _UNKNOWN):
            return
        if a == _CONSTANT:
            self.refuse([b], "forward makes a constant for them, which would not follow; make it a buffer")
        elif self.hidden(a) and (a[0] == b[0] or a[1] % b[1]):
            self.refuse([a], f"in blocks of {a[1]} entries for each channel and in blocks of {b[1]}")
        elif self.hidden(a) or b[0] not in {self.find(label)[0] for label, *_ in self.refused}:  # an error stays one
            tied = [(node, each) for node, (root, each) in self.roots.items() if root == b[0]]
            self.roots |= {node: (a[0], each * a[1] // b[1]) for node, each in tied}

    def sum_over(self, a: tuple, b: tuple) -> None:
        """Two dimensions are summed over together. What nothing is known of is as long as it is."""
        self.tie(*(_FIXED if self.find(label) == _UNKNOWN else label for label in (a, b)))
        self.summed += [a, b]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Compute, and label the results."""
        out = func(*args, **(kwargs or {}))
        operands, results = tensors_in((args, kwargs)), tensors_in(out)
        weights = [t for t in operands if id(t) in self.weights]
        self.operation = func.overloadpacket.__name__
        for t in [t for t in weights if t not in self.labels]:
            self.labels[t] = [((self.weights[id(t)], axis), 1) for axis in range(t.ndim)]
            self.roots |= {label[0]: label for label in self.labels[t]}
        if results and any(t in self.labels for t in operands) and not self.operation.startswith("new_"):
            labels = [[_FIXED] * t.ndim for t in results]
            if self.operation == "expand" or any(self.find(label) != _FIXED for t in operands for label in self.of(t)):
                given = {argument.name: argument.default_value for argument in func._schema.arguments}
                given |= dict(zip(given, args, strict=False)) | (kwargs or {})
                labels = self.propagate(func, given, operands, results)
            for t, its in zip(results, labels, strict=False):
                self.labels[t] = its if len(its) == t.ndim else [_UNKNOWN] * t.ndim
        if weights or self.operation in ("convolution", *_PRODUCTS):
            self.settled = len(self.refused)
        return out

    def propagate(self, func, given: dict[str, Any], operands: list[Tensor], results: list[Tensor]) -> list[list]:
        """The labels of an operation's results, where an operand has hidden channels."""
        name, x, y, shape, dims = self.operation, operands[0], results[0], results[0].shape, set()
        if name == "convolution":
            return [self.convolved(*operands[:2], operands[2:], given["transposed"], given["groups"], y)]
        if name in _PRODUCTS:
            *bias, a, b = operands
            self.sum_over(self.of(a)[-1], self.of(b)[-2])
            for one, other in zip(self.of(a)[:-2], self.of(b)[:-2], strict=True):
                self.tie(one, other)
            self.labels[y] = [*self.of(a)[:-1], self.of(b)[-1]]
            return [self.aligned([y, *bias], shape, dims)]
        if (func.is_view or name in _MOVES) and name not in ("expand", "view_as_real", "view_as_complex"):
            return self.moved(func, given, results)
        others = any(self.hidden(label) for t in operands[1:] for label in self.of(t))
        if given.keys() & {"dim", "dims"} and (name == "cat" or not others):  # reductions, softmax, sorting
            dims = given.get("dim", given.get("dims"))
            dims = {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims or range(x.ndim))}
            shape = shape if x.ndim == y.ndim else [1 if d in dims else n for d, n in enumerate(x.shape)]
        fit = all(t.ndim <= len(shape) for t in operands)
        after = self.aligned(operands, shape, dims) if fit else []
        few = len(results) == 1 or dims or any(kind in name for kind in ("pool", "dropout", "batch_norm"))
        if not fit or not few:  # layer norm, attention
            self.refuse([label for t in operands for label in self.of(t)], _WIDENED)
        return [after if x.ndim == y.ndim else [label for d, label in enumerate(after) if d not in dims]] * len(results)

    def aligned(self, operands: list[Tensor], shape: list[int], dims: set[int]) -> list[tuple]:
        """Elementwise with broadcasting (dimensions are tied from the last one on), or over some dimensions.

        Those of pooling have another number of entries afterwards.
        """
        labels = [_UNKNOWN] * len(shape)
        norm = "batch_norm" in self.operation or "group_norm" in self.operation
        for t in operands:
            first = 1 if norm and t.ndim == 1 else len(shape) - t.ndim
            for d, (label, n) in enumerate(zip(self.of(t), t.shape, strict=True), start=first):
                if d in dims or 1 != n != shape[d]:
                    self.refuse([label], _WIDENED if d in dims else "their number changes")
                    labels[d] = labels[d] if self.hidden(label) else _FIXED
                elif n < shape[d]:
                    self.tie(label, _FIXED)
                elif n > 1 or label != _CONSTANT:
                    self.tie(labels[d], label)
                    labels[d] = label if labels[d] in (_UNKNOWN, _CONSTANT) else labels[d]
        return labels

    def moved(self, func, given: dict[str, Any], results: list[Tensor]) -> list[list]:
        """Views and the like: channel numbers are moved instead of x, to see where they come out, and in what order."""
        x, *options = given.values()
        after = [[_FIXED] * t.ndim for t in results]
        for d, (label, n) in enumerate(zip(self.of(x), x.shape, strict=True)):
            if self.find(label) == _FIXED:
                continue
            numbers = torch.arange(n).view(-1, *[1] * (x.ndim - d - 1)).expand(x.shape).contiguous()
            for t, its in zip(tensors_in(func(numbers, *options)), after, strict=True):
                along = [e for e, m in enumerate(t.shape) if m == n == 1 or (t != t.narrow(e, 0, 1)).any()]
                m = t.shape[along[0]] if along else 0
                if m and m % n == 0 and (t.movedim(along[0], -1) == torch.arange(m) * n // m).all():
                    its[along[0]] = (label[0], label[1] * (m // n))
                elif n == 1:
                    self.tie(label, _FIXED)  # a dimension that goes away
                else:
                    self.refuse([label], "they may be merged with the dimensions after them, but not split or mixed")
                    its[:] = [_UNKNOWN if e in along and it == _FIXED else it for e, it in enumerate(its)]
        return after

    def convolved(self, x, weight, bias: list[Tensor], transposed: bool, groups: int, y) -> list[tuple]:
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
            self.refuse([(node, each), first, second], "of grouped convolutions only depthwise ones can be widened")
        self.refuse(self.of(x)[2:], "a convolution along them tells them apart")
        for a, b in [*((label, _FIXED) for label in space), *((self.of(t)[0], made) for t in bias)]:
            self.tie(a, b)
        return [_FIXED, made, *[_FIXED] * (y.ndim - 2)]
