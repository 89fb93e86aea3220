"""Arithmetic on the weights of networks of one architecture: the sum, and how two networks compare."""

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from numbers import Real

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightsum_lib.core.alike import check_alike, entries, settings, tensors_with_roles, unproven
from weightsum_lib.core.keys import Key, check_channels, embed, tensors_in, tensors_of, with_tensors

# Operations that are affine in all their tensors together, and those in each of two factors (after a bias, some).
_AFFINE = (
    "add sub rsub neg sum mean cumsum cat stack repeat flip roll tril triu where index index_select index_put gather "
    "embedding constant_pad_nd clone copy zero _to_copy _unsafe_view native_dropout upsample_bilinear2d lift_fresh "
    "upsample_bicubic2d upsample_nearest1d upsample_nearest2d upsample_linear1d reflection_pad1d reflection_pad2d fill "
    "unsafe_split masked_fill scatter_add index_add diag_embed complex trace avg_pool2d _fft_r2c _fft_c2r _fft_c2c"
)
_BIASED = frozenset(("addmm", "addmv", "baddbmm"))
_PRODUCTS = _BIASED | {"mul", "mm", "bmm", "mv", "dot", "convolution"}


def weighted_sum(parents: Iterable[Mapping[str, Tensor]], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Σ cᵢ·θᵢ, tensor by tensor, differentiable.

    One parent is added after another. Types shorter than float32 are added in float32 and rounded once, at the end.

    Args:
        parents: parameters by name, such as ``dict(network.named_parameters())``.
        coefficients: one finite number a parent.

    Raises:
        ValueError: another number of coefficients, one that is not a finite number; a tensor that one parent lacks,
            that differs in shape, type or device, or that holds integers, as ``num_batches_tracked`` does.

    >>> weighted_sum([{"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}], [1.0, 0.5])
    {'w': tensor([2.5000, 2.5000])}
    """
    total, kinds = {}, {}
    for i, (parent, c) in enumerate(zip_longest(parents, coefficients)):
        if parent is None or not isinstance(c, Real) or not abs(c) <= sys.float_info.max:
            raise ValueError(f"a sum takes one finite number a network as coefficients, got {list(coefficients)}")
        own = {name: (tuple(t.shape), t.dtype, t.device) for name, t in parent.items()}
        kinds = kinds if i else own
        check_alike(kinds, own, i)
        for name, tensor in parent.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise ValueError(f"'{name}' holds {tensor.dtype}, which has no weighted sum; leave it out")
            term = tensor.float() if tensor.dtype.itemsize < 4 else tensor
            term = term if c == 1 else term * float(c)
            total[name] = total[name] + term if i else term
    return {name: tensor.to(kinds[name][1]) for name, tensor in total.items()}


def check_summable(networks: Sequence[nn.Module]) -> None:
    """Raise unless the networks are one computation on different parameters, and the parameters its weights."""
    first = None
    for i, network in enumerate(networks):
        if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
            raise ValueError(f"network {i}, a {type(network).__name__}, is no module with parameters to sum")
        if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
            raise ValueError(f"network {i} is scripted or traced, which hides what it computes; sum it before that")
        modules, tensors, kinds, names = {}, tensors_with_roles(network), {}, {}
        for name, (role, tensor) in tensors.items():
            if is_lazy(tensor):
                raise ValueError(f"'{name}' of network {i} has no shape yet: call the network on an example first")
            tied = names.setdefault(id(tensor), name)
            kinds[name] = f"{tuple(tensor.shape)}, a {role} of {tensor.dtype} on {tensor.device}"
            kinds[name] += f", tied to '{tied}'" if tied != name else ""
        for path, module in network.named_modules(remove_duplicate=False):
            modules |= settings(path, module)
            hooked = module._forward_pre_hooks or module._forward_hooks or module._backward_hooks
            hooked = hooked or module._backward_pre_hooks or hasattr(module, "_orig_mod")  # compiled
            if is_parametrized(module) or hooked or isinstance(module, WeightSum):
                todo = "remove or merge first (remove_parametrizations, remove_weight_norm, prune.remove, materialize)"
                what = f"'{path}' of network {i} is a sum, parametrized or compiled, or has a hook (forward"
                raise ValueError(f"{what} (pre-)hook or backward); {todo}")
        first = first or (kinds, modules, tensors)
        check_alike(first[0], kinds, i)
        for name, (role, tensor) in tensors.items():
            same = role != "constant" or tensor is first[2][name][1] or tensor.is_meta
            if not (same or entries(tensor) == entries(first[2][name][1])):
                raise ValueError(f"'{name}', which is no parameter, differs between networks 0 and {i}; a sum has one")
        check_alike(first[1], modules, i)


class _Followed(TorchDispatchMode):
    """Refuses a forward pass that computes a weight from parameters in other than affine steps.

    The sum of the parameters then does not give the sum of the weights: (g + g')·(v + v') is not g·v + g'·v'. What
    depends on parameters and constants alone is followed by its storage, which views and updates in place share; so is
    the input behind a parameter of a layer of another library, since (x·A)·B is x·(A·B).

    Args:
        weights: the parameters.
        body: the network; its other tensors are constants, and so is what else takes part.
        layers: paths of other libraries' layers that have parameters.
        inputs: of the pass.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Mapping[str, Tensor], body: nn.Module, layers: Iterable[str], inputs: object):
        super().__init__()
        self.layers, self.trained = set(layers), torch.is_grad_enabled()
        # storage: parameters that it depends on, whether on the input too, and what keeps its address from being reused
        constants = [t for role, t in tensors_with_roles(body).values() if role != "parameter"]
        objects = [getattr(leaf, "__dict__", {}) for leaf in tree_leaves(inputs)]  # batches of other libraries
        self.sources = {_storage(t): (frozenset(), False, t) for t in constants}
        self.sources |= {_storage(t): (frozenset([name]), False, t) for name, t in weights.items()}
        self.sources |= {_storage(t): (frozenset(), True, t) for t in tensors_in((inputs, objects))}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        """Compute one operation, and say what its result depends on."""
        out = op(*args, **(kwargs or {}))
        other = (frozenset(), False)  # what is not known is a constant
        frame = sys._getframe() if self.trained else None
        while frame and frame.f_code is not WeightSum.forward.__code__:
            if frame.f_code.co_filename == checkpoint.__file__:
                todo = "checkpoint the sum itself: torch.utils.checkpoint.checkpoint(total, x)"
                raise ValueError(f"a checkpoint inside the network computes again once the weights are gone; {todo}")
            frame = frame.f_back
        name, results, operands = op.__name__.split(".")[0].rstrip("_"), tensors_in(out), tensors_in((args, kwargs))
        sources = [self.sources.get(_storage(t), other) for t in operands]
        if lost := [t for t in operands if isinstance(t, nn.Parameter) and _storage(t) not in self.sources]:
            todo = "keep it in no list or closure, but in nn.ParameterList, nn.ModuleList or a method"
            raise ValueError(
                f"a parameter {tuple(lost[0].shape)} takes part that the network has not registered; {todo}"
            )
        names, inputs = frozenset().union(*(s[0] for s in sources)), sum(s[1] for s in sources)
        factors = [self.sources.get(_storage(t), other)[0] for t in args[name in _BIASED :][:2]]
        product = name in _PRODUCTS and all(factors)
        affine = getattr(op, "is_view", False) or name in _AFFINE.split() or (name in _PRODUCTS and not product)
        affine |= name == "div" and not factors[1] and not (kwargs or {}).get("rounding_mode")
        affine &= all(t.is_floating_point() or t.is_complex() for t in results)  # a cast to integers rounds
        layers = self.layers.intersection(*({n.rpartition(".")[0] for n in some} for some in factors))
        if "_like" in name or name.startswith("new_"):
            names, inputs = frozenset(), 0  # only the shape is used
        elif (inputs == 0 and names and not affine) or (inputs == 1 and product and layers):
            raise ValueError(
                f"a weight is computed from {' and '.join(sorted(names))} by {name}, which is not affine: the sum of "
                "the parameters does not give the sum of the weights; merge them into one parameter first (if it is no "
                "weight but an activation: give every input as a tensor)"
            )
        if inputs:
            linear = inputs == 1 and (affine or product)
            names = frozenset(n for n in names if linear and n.rpartition(".")[0] in self.layers)
        for tensor in results:
            light = inputs and not names and tensor.layout == torch.strided  # an activation, whose memory may go
            held = StorageWeakRef(tensor.untyped_storage()) if light else tensor
            self.sources[_storage(tensor)] = (names, inputs > 0, held)
        return out


def _storage(value) -> int:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return value.untyped_storage()._cdata if dense else id(value)


class WeightSum(nn.Module):
    """The network whose weights are Σ cᵢ·θᵢ.

    Its ``forward`` is that of one plain network; gradients flow through the sum to every parent.
    Its parameters are its parents' parameters; a network that is given twice counts twice. Batch-norm statistics are
    its own: a sum has none to inherit, so they start at (0, 1); train it, or see
    :func:`~weightsum_lib.recalibrate`. Other buffers must be equal and are shared. ``train()`` and ``eval()`` switch
    the sum only, never a parent. What else the networks have is copied here: of later changes only those of parameters
    are followed, and a state dict has neither coefficients nor keys. One thread at a time may call a sum; what
    :meth:`materialize` gives is a plain network.

    That the networks are of one architecture is tested here. That their weights are their parameters is tested in the
    first forward pass: one that is a product or another non-affine function of parameters is refused. (What leaves
    torch on its way, to NumPy for example, is not seen.)

    Args:
        networks: two or more modules of one architecture.
        coefficients: one finite number a network; all ones by default. The attribute can be set anew.
        keys: one :class:`~weightsum_lib.core.keys.Key` a network, see :meth:`use_keys`. Without keys channel i is
            added to channel i.

    Raises:
        ValueError: fewer than two networks, something that is no module; another number of coefficients or keys, or
            some that don't fit; networks without parameters, with lazy ones, parametrizations or hooks, compiled or
            scripted ones; networks that differ in a shape, type, device, layer, the layers' order, in what is tied, in
            the code of a class, in an attribute (but for what can't be pickled), in a global of its module that
            forward reads, or in a tensor that is neither a parameter nor a batch-norm statistic. The tensor, module or
            attribute is named.

    >>> a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> x = torch.ones(1, 2)
    >>> torch.allclose(WeightSum([a, b])(x), a(x) + b(x))
    True
    """

    def __init__(self, networks: Sequence[nn.Module], coefficients: Sequence[float] | None = None, keys=None):
        super().__init__()
        networks = list(networks)
        if len(networks) < 2:
            raise ValueError(f"a sum takes two networks or more, got {len(networks)}")
        check_summable(networks)
        self.networks = nn.ModuleList(networks)
        self.coefficients = [1.0] * len(networks) if coefficients is None else [*coefficients]
        weighted_sum([{} for _ in networks], self.coefficients)  # checks them
        # Layers of other libraries, for example, may compute a weight. A forward pass in each mode proves otherwise.
        self._others = [*unproven(networks[0])]
        self._proven, self._wide = set(), ()
        self.use_keys(keys)

    @torch.no_grad()
    def use_keys(self, keys: Sequence[Key] | None) -> None:
        """Put the networks' channels elsewhere, or where they are (None); the sum's statistics start anew.

        Args:
            keys: one a network, all for a wide network of the same sizes: each network's channels are put where its
                key says before the weights are added.

        Raises:
            ValueError: another number of keys than of networks, keys for different wide networks or of another
                network, or a tensor over hidden channels that is neither parameter nor statistic.
        """
        network, wide = self.networks[0], None
        if keys is not None:
            if len(keys) != len(self.networks):
                raise ValueError(f"{len(self.networks)} networks need as many keys, got {len(keys)}")
            wide = (keys[0].channels.axes, keys[0].sizes)
            if other := [key.sizes for key in keys if (key.channels.axes, key.sizes) != wide]:
                raise ValueError(f"keys of one sum are for one wide network, got {wide[1]} and {other[0]}")
        if wide != self._wide:  # else only the places change: a training step builds nothing
            tensors = tensors_of(network)
            if wide:
                check_channels(network, keys[0].channels)
                for name, (role, _) in tensors_with_roles(network).items():
                    if role == "constant" and wide[0].get(name):
                        raise ValueError(f"'{name}' can't be shared under keys: it runs over hidden channels")
                tensors = embed(tensors, keys[0])
            # the computation, and the statistics; weights are given anew at each call, so it keeps none
            self.body = with_tensors(network, tensors).train(self.training).requires_grad_(False)
            for parameter in self.body.parameters():
                parameter.data = parameter.new_empty(0)
        self._wide, self._warned, self.keys = wide, False, keys
        self._place_keys()
        for layer in self._norms():
            layer.running_mean.zero_()
            layer.running_var.fill_(1)
            layer.num_batches_tracked.zero_()

    def _norms(self) -> list[_BatchNorm]:
        return [m for m in self.body.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]

    def _place_keys(self) -> None:  # on the device once, not at each step
        self.keys = self.keys and [key.to(next(self.networks.parameters()).device) for key in self.keys]

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._place_keys()
        return self

    def _summed(self, parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if self.keys:  # one after another, so that the wide copies of all networks are never there at once
            parts = (embed(part, key) for part, key in zip(parts, self.keys, strict=True))
        return weighted_sum(parts, self.coefficients)

    def _weights(self, held: Sequence[int]) -> dict[str, Tensor]:
        parts = [dict(n.named_parameters()) for n in self.networks]
        for i in held:
            parts[i] = {name: p.detach() for name, p in parts[i].items()}
        return self._summed(parts)

    def weights(self, held: Sequence[int] = ()) -> dict[str, Tensor]:
        """The summed parameters by name, attached to the graph of every parent but those ``held`` (by number).

        Raises:
            ValueError: before the first forward pass, if a layer of another library has parameters of its own.
        """
        if self._others and not self._proven:
            todo = "call the sum on an example first, neither compiled nor under torch.func or inference_mode"
            layer = self._others[0] or type(self.networks[0]).__name__
            raise ValueError(f"'{layer}' may compute its weight, or with one that is not registered; {todo}")
        return self._weights(held)

    def forward(self, *args, held: Sequence[int] = (), **kwargs):
        """The output of the network with the summed weights, e.g. images (N, C, H, W) to logits (N, classes).

        All arguments are the network's, but that no gradient goes to the parents ``held`` (by number). In evaluation
        mode with batch norm that has no statistics yet there is a warning, once.

        Raises:
            ValueError: in the first pass of either mode, with and without gradients, if a weight is computed from
                parameters in other than affine steps, a parameter takes part that is not registered, or activations are
                checkpointed inside the network.
        """
        compiled = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # can't be followed,
        mode = (self.training, torch.is_grad_enabled())
        follow = mode not in self._proven and not (compiled or torch.is_inference_mode_enabled())  # nor this
        weights = self._weights(held) if follow else self.weights(held)
        with _Followed(weights, self.body, self._others, (args, kwargs)) if follow else nullcontext():
            out = functional_call(self.body, weights, args, kwargs)
        if follow:
            self._proven.add(mode)
        if not (self.training or self._warned or compiled):
            self._warned = True  # or there is nothing to warn of; looked at once, for the host has to wait
            if any(not m.running_mean.any() and (m.running_var == 1).all() for m in self._norms()):
                todo = "recalibrate(sum, images), train the sum, or add_statistics()"
                warnings.warn(f"the sum's batch norm still has mean 0 and variance 1; {todo}", stacklevel=4)
        return out

    def train(self, mode: bool = True) -> "WeightSum":
        """Switch the sum (not its parents) to training or evaluation mode."""
        self.training = mode
        self.body.train(mode)
        return self

    @torch.no_grad()
    def add_statistics(self) -> "WeightSum":
        """Give the sum the sum of its parents' batch-norm statistics, with the coefficients.

        With disjoint keys and coefficients of 1 that gives each channel its owner's statistics, with sparse random keys
        nearly so. Otherwise it is wrong.

        Raises:
            ValueError: a variance would be negative, under a negative coefficient; under keys, a layer whose channels
                have none, since they reach the input or output.
        """
        names = [name for name, (role, _) in tensors_with_roles(self.body).items() if role == "statistic"]
        for name in names if self.keys else ():
            if self.body.get_buffer(name).ndim and not self.keys[0].channels.axes[name]:
                raise ValueError(f"'{name}' is of channels that all networks share; recalibrate(sum, images) instead")
        parts = [{name: n.get_buffer(name) for name in names} for n in self.networks]
        total = self._summed([{name: b for name, b in part.items() if b.ndim} for part in parts])
        for name in names:  # the numbers of batches that they come from are no statistics, and have no coefficient
            value = total[name] if name in total else sum(part[name] for part in parts)
            if name.endswith("running_var") and (value < 0).any():
                raise ValueError(f"'{name}' would be negative, with {self.coefficients} as coefficients; recalibrate")
            self.body.get_buffer(name).copy_(value)
        return self

    @torch.no_grad()
    def materialize(self) -> nn.Module:
        """The sum as a plain network of its own, with the sum's batch-norm statistics and mode, and copies of buffers.

        A parameter requires gradients if it does in any of the networks.

        Raises:
            ValueError: see :meth:`weights`.
        """
        plain = with_tensors(self.body, {**self.weights(), **dict(self.body.named_buffers())})
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(any(n.get_parameter(name).requires_grad for n in self.networks))
        return plain.train(self.training)


@torch.no_grad()
def compare_layers(a: nn.Module, b: nn.Module) -> list[dict]:
    """How the weights of two networks compare, layer by layer.

    Batch norm hides the scale of the layer before it, so a sum can "survive" because one network is
    simply larger: look at the norm ratio before believing a small gap.

    Args:
        a: any network with convolutions (transposed ones too) or linear layers.
        b: a network with the same ones.

    Returns:
        a list with one dict for each convolution and linear layer, with ``layer``, the last part of its name, or the
        whole where two layers would be called the same; ``norm_ratio``, ‖W_a‖ / ‖W_b‖ (Frobenius), infinite where
        only W_b is 0, NaN where both are; ``cosine`` of the angle between the flattened weights, NaN where one is 0.

    Raises:
        ValueError: a layer that one network lacks, or whose shape differs; it is named.
    """
    kinds = _ConvNd | nn.Linear
    layers = [{n: m.weight for n, m in net.named_modules() if isinstance(m, kinds)} for net in (a, b)]
    check_alike(*({name: tuple(w.shape) for name, w in weights.items()} for weights in layers), 1)
    rows, last = [], [name.rpartition(".")[2] for name in layers[0]]
    for (name, weight), short in zip(layers[0].items(), last, strict=True):
        kind = torch.promote_types(torch.promote_types(weight.dtype, layers[1][name].dtype), torch.double)
        wa, wb = weight.flatten().to(kind), layers[1][name].flatten().to(kind)
        norm_a, norm_b = wa.norm(), wb.norm()  # x / 0 is ∞, 0 / 0 is NaN
        ratio, cosine = (norm_a / norm_b).item(), (torch.vdot(wa, wb).real / (norm_a * norm_b)).item()
        rows.append({"layer": short if last.count(short) == 1 else name, "norm_ratio": ratio, "cosine": cosine})
    return rows
