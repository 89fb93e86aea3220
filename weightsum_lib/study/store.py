"""Files that are whole or absent, and keys by content: what a result depends on is hashed, its code included."""

import ast
import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

import weightsum_lib

PACKAGE = Path(__file__).parent.parent
ROOT = PACKAGE.parent


def sources() -> dict[str, str]:
    """The text of every module of this package, by its name, such as "core.weights"."""
    paths = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


_SOURCES = sources()  # when this is imported: what is edited while it runs is not what has run
_DATA = {path.name: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.json"))}  # that code reads
_THIS = "study.store"  # keeps results, but makes none: no part of any digest
# A name in dumped code, and the attribute of it that is meant.
_USE = re.compile(r"Name\(id='(\w+)'(?:, ctx=\w+\(\))?\)(?:, attr='(\w+)')?")


def content_key(content) -> str:
    """A short hex digest of JSON-able content; equal content, equal key."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stripped(tree: ast.Module) -> ast.Module:
    """A program less what changes no result: docstrings, annotations, fields of dataclasses (whose values are data)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.dump(d) for d in node.decorator_list):
            node.body = [n for n in node.body if not isinstance(n, ast.AnnAssign)] or [ast.Pass()]
        elif isinstance(node, ast.FunctionDef | ast.arg):
            node.returns = node.annotation = None  # each kind has one of them
        match node:
            case ast.AST(body=[ast.Expr(ast.Constant(str())), *_]):
                node.body[0] = ast.Pass()
    return tree


@functools.cache
def _parsed(module: str) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """The code of a module's definitions by name ("" for what else it does), and its imports (:func:`_imports`)."""
    definitions, tree = {"": []}, _stripped(ast.parse(_SOURCES[module]))
    for node in (n for n in tree.body if not isinstance(n, ast.Import | ast.ImportFrom)):
        assigns = isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
        targets = (getattr(node, "targets", None) or [node.target]) if assigns else []
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        for name in names or [getattr(node, "name", "")]:
            definitions.setdefault(name, []).append(ast.dump(node))
    return {name: "\n".join(code) for name, code in definitions.items()}, _imports(tree)


def _imports(tree: ast.AST) -> dict[str, tuple[str, str]]:
    """What a program imports from this package: alias to (module, name); the name is empty for a module."""
    found = {}
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)):
        package, _, home = (node.module or "").partition(".")
        for alias in node.names if package == PACKAGE.name else ():
            module, origin = f"{home}.{alias.name}".lstrip("."), home or weightsum_lib.EXPORTS.get(alias.name, "")
            found[alias.asname or alias.name] = (module, "") if module in _SOURCES else (origin, alias.name)
    return {alias: target for alias, target in found.items() if target[0] in _SOURCES}


def imported(source: str) -> set[str]:
    """The modules of this package, such as "core.weights", that a source text imports or whose names it imports."""
    return {module for module, _ in _imports(ast.parse(source)).values()}


@functools.cache
def reached(*roots: str) -> dict[str, str]:
    """The definitions that a computation can come to, and their code without docstrings and annotations.

    Followed are names, and attributes of imported modules. What is looked up by a name that only exists when the
    program runs is not seen, so it is a root as well.

    Args:
        roots: ``"study.train:train"``, a definition; or ``"study.train"``, all of a module, and then also all of every
            module that is passed around as a value.
    """
    seen: dict[tuple[str, str], str] = {}
    whole = any(":" not in root for root in roots)
    todo = [(module, name or "*") for module, _, name in (root.partition(":") for root in roots)]
    while todo:
        module, name = todo.pop()
        if module == _THIS or (module, name) in seen:
            continue
        definitions, imports = _parsed(module)
        todo.append((module, ""))  # what a module does when it is imported
        if name == "*":
            todo += [(module, each) for each in definitions]
        elif name in definitions:
            seen[module, name] = definitions[name]
            seen |= {(file, ""): text for file, text in _DATA.items() if repr(file) in definitions[name]}
            for used, attribute in _USE.findall(definitions[name]):
                home, inner = imports.get(used, (module, used))
                inner = inner or attribute or ("*" if whole else "")
                if inner and (used in imports or used in definitions):
                    todo.append((home, inner))
        elif name in imports:  # and imported from there
            todo.append((imports[name][0], imports[name][1] or "*"))
        else:
            raise LookupError(f"weightsum_lib.{module} defines no '{name}'")
    return {f"{module}:{name}": code for (module, name), code in sorted(seen.items()) if code}


def code_digest(*roots: str) -> str:
    """A digest of all code that these roots reach (:func:`reached`)."""
    return content_key(reached(*roots))


def attributes(*roots: str) -> set[str]:
    """The names of all attributes that the code which these roots reach reads or sets."""
    return {name for code in reached(*roots).values() for name in re.findall(r"attr='(\w+)'", code)}


def edited() -> bool:
    """Whether the package was edited since this process imported it."""
    return sources() != _SOURCES


def commit() -> str:
    """The commit of the working tree, with "+" where it has changes; "unknown" outside git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, cwd=PACKAGE, text=True, stderr=subprocess.DEVNULL).strip()
    return "unknown"


_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def replaced(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends well, and vanishes when it does not.

    Raises:
        OSError: the disk is full, or the folder can't be written. The message names the file, and says what was needed
            (``size``, in bytes) and what to do.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o644)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # on the disk before it has the name
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        needed = f" ({size:,} bytes were needed)" if size else ""
        what = f"{path} can't be written: {error.strerror}{needed}; nothing half written is kept"
        raise OSError(f"{what}. Make room, or the folder writable: the same command goes on") from error
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written there is nothing
            temporary.unlink()


def sweep(folder: Path) -> None:
    """Delete what processes that were killed while they wrote have left in a folder: untouched for a day."""
    for left in folder.rglob("." + 8 * "[0-9a-f]" + ".*"):  # what :func:`replaced` calls a file that is not whole
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 86_400:
                left.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one piece: the old one or the new one, never half of it."""
    with replaced(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content) -> None:
    """Write JSON in one piece."""
    write_bytes(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path):
    """The content of a JSON file; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def write_sealed(path: Path, content: Mapping) -> None:
    """Write a JSON object with a digest of it and of its place, so that :func:`read_sealed` tells another or damage."""
    content = json.loads(json.dumps(content))  # as it will be read
    write_json(path, content | {"seal": content_key([*path.parts[-2:], content])})


def read_sealed(path: Path) -> dict | None:
    """What :func:`write_sealed` has written there; None where there is nothing, or something else."""
    found = read_json(path)
    if isinstance(found, dict) and found.pop("seal", "") == content_key([*path.parts[-2:], found]):
        return found
    return None


def _tensors_sha256(tensors: Mapping, about: str) -> str:
    import torch  # slow to load, and not wanted where make finds nothing to do

    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping, about) -> None:
    """Write tensors by name with their checksum and JSON-able words ``about`` them (safetensors), in one piece."""
    from safetensors.torch import save

    tensors, about = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, json.dumps(about)
    write_bytes(path, save(tensors, {"about": about, "sha256": _tensors_sha256(tensors, about)}))


def read_tensors(path: Path) -> tuple[dict, object] | None:
    """What :func:`write_tensors` has written: tensors and ``about``; None where there is none or it is damaged."""
    from safetensors import SafetensorError, safe_open

    with contextlib.suppress(OSError, ValueError, SafetensorError), safe_open(path, "pt") as file:
        tensors, written = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        about = written.get("about", "")
        if written.get("sha256") == _tensors_sha256(tensors, about):
            return tensors, json.loads(about)
    return None


def packed(folder: Path) -> dict[str, bytes]:
    """A folder's files, to travel; ``{}`` where there are none."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def unpack(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files that have travelled into a folder, the last one last, each in one piece."""
    for name, content in files.items():
        write_bytes(folder / name, content)


lock = FileLock  # between processes, e.g. so that two notebooks never train at once; a dead process holds none


@contextlib.contextmanager
def alone(path: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold a lock between processes, which ends with its process; who waits says for whom, and then for how long."""
    held, owner, started = lock(path), path.with_suffix(".owner"), time.time()
    try:
        held.acquire(timeout=0)
    except Timeout:
        who = "another process"
        with contextlib.suppress(OSError):
            who += f" ({owner.read_text(encoding='utf-8')})"
        say(f"{who} holds {path.name}; waiting until it has ended, as long as it takes (Ctrl-C stops the waiting)")
        held.acquire()
        say(f"{path.name}: waited {time.time() - started:.0f} s")
    try:
        owner.write_text(f"process {os.getpid()}, since {time.strftime('%H:%M:%S')}", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink()
        held.release()
