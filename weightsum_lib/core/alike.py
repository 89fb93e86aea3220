"""Whether networks are one computation on different parameters: what is compared before they are summed."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib.core.keys import tensors_in

MODULE = frozenset(vars(nn.Module())) | {
    "_compiled_call_impl",
    "_is_torch_compile",
}  # attributes that say nothing of its computation
_SIGNED_ZERO = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), CodeType, set, frozenset)


def check_alike(first: Mapping[str, object], other: Mapping[str, object], number: int) -> None:
    """Raise ValueError where network ``number`` has another value of a name than network 0, or none."""
    for name in [*first, *other]:
        here, there = first.get(name, "missing"), other.get(name, "missing")
        if here != there:
            what = f"'{name}' is {here!s:.200} in network 0 and {there!s:.200} in network {number}"
            raise ValueError(f"{what}; a sum of weights needs one architecture, width, type and device, equal settings")


def tensors_with_roles(network: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """All tensors under all their names: role (parameter, statistic of batch norm, constant) and tensor."""
    found = {}
    for path, module in network.named_modules(remove_duplicate=False):
        held = ((k, v, i, t) for k, v in vars(module).items() if k not in MODULE for i, t in enumerate(tensors_in(v)))
        own = {k if t is v else f"{k}[{i}]": t for k, v, i, t in held if t is v or not isinstance(t, nn.Parameter)}
        for name, tensor in {**own, **module._parameters, **module._buffers}.items():
            if isinstance(tensor, Tensor):
                norm = isinstance(module, _BatchNorm) and name in ("running_mean", "running_var", "num_batches_tracked")
                role = "parameter" if isinstance(tensor, nn.Parameter) else "statistic" if norm else "constant"
                found[f"{path}.{name}" if path else name] = role, tensor
    return found


def entries(tensor: Tensor) -> bytes:
    """A tensor's values, to compare: NaN is NaN, and −0 is 0."""
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    dense = (dense.dequantize() if dense.is_quantized else dense).cpu()
    dense = dense + 0 if dense.dtype in _SIGNED_ZERO else dense
    return dense.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _value(value: object, seen: dict) -> object:
    """A setting as it can be compared: a function by its code, what it holds and the plain globals that it reads, an
    object by its class and what pickle takes of it.

    Of modules and parameters, which are compared by themselves, of generators of random numbers and of what can't be
    pickled there is only the type. An object that was met before is its number in ``seen``: each is taken apart once.
    """
    inner = partial(_value, seen=seen)
    if isinstance(value, set | frozenset):
        return {held if isinstance(held, _PLAIN) else repr(_value(held, {})) for held in value}
    if isinstance(value, _PLAIN):
        return value if value == value else "nan"
    if id(value) in seen:
        return f"object {seen[id(value)][0]}"
    named = f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else type(value).__qualname__
    random = f"{type(value).__module__}.".startswith(("random.", "numpy.random."))
    if random or isinstance(value, nn.Module | nn.Parameter | torch.Generator):
        return named
    seen[id(value)] = len(seen), value  # kept, so that its number is not given to another
    with suppress(Exception):  # of any kind: what can't be pickled
        if isinstance(value, Tensor):
            kind = [named, str(value.dtype), *value.shape]
            return kind if value.is_meta else [*kind, entries(value)]
        if isinstance(value, type):  # its own code, whatever it is called
            own = {k: v for k, v in vars(value).items() if isinstance(v, FunctionType)}
            return [named, {} if value.__module__.startswith("torch.") else inner(own)]
        if isinstance(value, property):
            return inner(value.fget)
        if isinstance(value, staticmethod | classmethod):
            return inner(value.__func__)
        if isinstance(value, MethodType):
            return [inner(value.__func__), inner(value.__self__)]
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
            read = {n: value.__globals__.get(n) for n in value.__code__.co_names}
            read = {n: held for n, held in read.items() if isinstance(held, _PLAIN)}
            return [value.__code__, *map(inner, (value.__defaults__, value.__kwdefaults__, cells, read))]
        if isinstance(value, Mapping):
            return {str(key): inner(held) for key, held in value.items()}
        if isinstance(value, list | tuple):
            return [*map(inner, value)]
        name, *parts = [taken] if isinstance(taken := value.__reduce_ex__(4), str) else taken
        return [inner(name), *(inner([*part] if isinstance(part, Iterator) else part) for part in parts)]
    return named


def settings(path: str, module: nn.Module) -> dict[str, object]:
    """What a module's computation may depend on beside its tensors: kind, layers, what its classes and it have."""
    found = {f"module {path}": f"{module._get_name()}({module.extra_repr()}) of {[*module._modules]}"}
    for depth, base in enumerate(type(module).__mro__[:-1]):
        for name, held in vars(base).items() if not base.__module__.startswith("torch.") else ():
            if isinstance(held, FunctionType) or not name.startswith("__"):
                found[f"code of {path}{depth * '.super()'}.{name}"] = _value(held, {})
    own = {k: v for k, v in vars(module).items() if k not in MODULE and not isinstance(v, Tensor)}
    return found | {f"{path}.{name}": _value(held, {}) for name, held in own.items()}
