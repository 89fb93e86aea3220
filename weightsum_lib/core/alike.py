"""Whether networks are one computation on different parameters: what is compared, and what wants a proof."""

import dis
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsum_lib.core.keys import tensors_in

# attributes that say nothing of a module's own computation, and with them those of recurrent layers that are followed
_MODULE = {*vars(nn.Module()), "_compiled_call_impl", "_is_torch_compile"}  # torch.compile leaves these behind
_SIGNED_ZERO = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_KNOWN = _MODULE | {"_flat_weights", "_flat_weight_refs"}
_PLAIN = bool | int | float | complex | str | bytes | None | CodeType
_AT = re.compile(r" at 0x\w+")  # in memory, in what Python writes of code


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
        held = ((k, v, i, t) for k, v in vars(module).items() if k not in _MODULE for i, t in enumerate(tensors_in(v)))
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


def _codes_of(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions inside it."""
    yield code
    for held in code.co_consts:
        if isinstance(held, CodeType):
            yield from _codes_of(held)


def _globals_read(function: FunctionType) -> dict[str, object]:
    """What a function reads of its module's globals, of functions only those defined there."""
    found = {name: function.__globals__.get(name) for name in _globals_of(function.__code__)}
    own = function.__module__
    return {name: v for name, v in found.items() if not isinstance(v, FunctionType) or v.__module__ == own}


@cache
def _globals_of(code: CodeType) -> list[str]:
    loads = [i for inner in _codes_of(code) for i in dis.get_instructions(inner)]
    return [i.argval for i in loads if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]


def _says(name: str, held: object) -> bool:
    """Whether an attribute of a class says what it computes."""
    plain = isinstance(held, _PLAIN | staticmethod | classmethod | property) and not name.startswith("__")
    return plain or isinstance(held, FunctionType)


def _value(value: object, seen: dict) -> object:
    """A setting as it can be compared: a function by its code, what it holds and the plain globals that it reads, an
    object by its class and what pickle takes of it.

    Of modules and parameters, which are compared by themselves, of generators of random numbers and of what can't be
    pickled there is only the type. An object that was met before is its number in ``seen``: each is taken apart once.
    """
    inner = partial(_value, seen=seen)
    if isinstance(value, set | frozenset):
        return {held if isinstance(held, _PLAIN) else _AT.sub("", repr(_value(held, {}))) for held in value}
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
            own = (base for base in value.__mro__[:-1] if not base.__module__.startswith("torch."))
            return [named, *(inner({k: v for k, v in vars(base).items() if _says(k, v)}) for base in own)]
        if isinstance(value, partial):  # whose state says whether somebody has asked for its attributes
            return [named, *map(inner, (value.func, value.args, value.keywords))]
        if isinstance(value, property):
            return inner(value.fget)
        if isinstance(value, staticmethod | classmethod):
            return inner(value.__func__)
        if isinstance(value, MethodType):
            return [inner(value.__func__), inner(value.__self__)]
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
            read = {k: v for k, v in _globals_read(value).items() if isinstance(v, _PLAIN | FunctionType)}
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
    known = {id(base): (depth, base) for depth, base in enumerate(type(module).__mro__)}  # compared here, once
    for depth, base in enumerate(type(module).__mro__[:-1]):
        for name, held in vars(base).items() if not base.__module__.startswith("torch.") else ():
            if isinstance(held, FunctionType) or not name.startswith("__"):
                found[f"code of {path}{depth * '.super()'}.{name}"] = _value(held, dict(known))
    own = {k: v for k, v in vars(module).items() if k not in _MODULE and not isinstance(v, Tensor)}
    return found | {f"{path}.{name}": _value(held, {}) for name, held in own.items()}


def unproven(network: nn.Module) -> Iterator[str]:
    """Paths of modules that may compute a weight, or with another one than a copy of the network has.

    These are lists, other libraries' layers that have parameters or name one's, and what is :func:`astray`.
    """
    last, stray = {name.rpartition(".")[2] for name, _ in network.named_parameters()}, {*astray(network)}
    for path, module in network.named_modules():
        others = [c for c in type(module).__mro__ if not c.__module__.startswith(("torch.nn.", "weightsum_lib."))]
        own = module._parameters and (len(others) > 1 or "container" in type(module).__module__)  # besides object
        if own or path in stray or _names(others) & last:
            yield path


def astray(network: nn.Module) -> Iterator[str]:
    """Paths of modules with an attribute that leads to parameters which are not registered, or in a function."""
    registered = {*map(id, network.modules()), *map(id, network.parameters())}
    for path, module in network.named_modules():
        held = (value for name, value in vars(module).items() if name not in _KNOWN)
        if any(_is_astray(value, registered) for value in held):
            yield path


def _names(classes: Sequence[type]) -> set[str]:
    """What forward names, and what it may call of these classes and their modules, as far as their code says."""
    found, todo, functions = set(), {"forward"}, []
    while (new := todo - found) or functions:
        found |= new
        functions += [vars(c)[name] for c in classes for name in new if name in vars(c)]
        held = [getattr(f, "fget", None) or getattr(f, "__func__", f) for f in functions]
        held = [inspect.unwrap(f) for f in held if isinstance(f, FunctionType)]
        read, functions = [*map(_globals_read, held)], []
        for f, names in zip(held, read, strict=True):
            todo |= {name for code in _codes_of(f.__code__) for name in code.co_names}
            functions += [v for name, v in names.items() if isinstance(v, FunctionType) and name not in found]
            found |= names.keys()
    return found


def _is_astray(value: object, registered: set[int]) -> bool:
    """Whether an attribute leads to parameters that a deep copy does not take along as the network's own: they are none
    of the ``registered``, or in a function, a method of a builtin, a weak reference."""
    todo, seen = [(value, True)], {}
    while todo and len(seen) < 100_000:
        value, copied = todo.pop()
        if (id(value), copied) in seen or isinstance(value, _PLAIN | type | ModuleType):
            continue
        seen[id(value), copied] = value  # kept, so that its number is not given to another
        weighs = isinstance(value, nn.Module) and next(value.parameters(), None) is not None
        if (weighs or isinstance(value, nn.Parameter)) and not (copied and id(value) in registered):
            return True
        with suppress(Exception):  # of any kind: what can't be copied
            if isinstance(value, FunctionType):
                cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
                todo += [(v, False) for v in (*cells, value.__defaults__, value.__kwdefaults__, vars(value))]
            elif isinstance(value, ReferenceType):
                todo.append((value(), False))
            elif isinstance(value, MethodType):
                todo += [(value.__func__, copied), (value.__self__, copied)]
            elif isinstance(value, Mapping | list | tuple | set | frozenset):
                inside = value.values() if isinstance(value, Mapping) else value
                todo += [(v, copied) for v in inside if not isinstance(v, _PLAIN)]
            elif isinstance(value, BuiltinMethodType) or hasattr(value, "__wrapped__"):
                todo += [(getattr(value, name, None), False) for name in ("__self__", "__wrapped__")]
            elif not isinstance(value, nn.Module | Tensor) and isinstance(taken := value.__reduce_ex__(4), tuple):
                todo += [(v, copied) for v in taken[1:3]]
    return bool(todo)  # too much to look at
