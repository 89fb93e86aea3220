"""Files that are whole or absent, and keys by content: what a result depends on is hashed, its code included."""

import ast
import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock

import weightsum_lib

PACKAGE = Path(__file__).parent.parent
ROOT = PACKAGE.parent
# Read when this is imported: what is edited while it runs is not what has run.
_SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
_DATA = {path.name: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.json"))}  # that code reads
_THIS = "study.store"  # keeps results, but makes none: no part of any digest


def content_key(content) -> str:
    """A short hex digest of JSON-able content; equal content, equal key."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Code(ast.NodeTransformer):
    """Strips what changes no result: docstrings, annotations, and the fields of dataclasses, whose values are data."""

    def generic_visit(self, node):
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0] = ast.Pass()
        return node

    def visit_ClassDef(self, node):
        if any("dataclass" in ast.dump(d) for d in node.decorator_list):
            node.body = [n for n in node.body if not isinstance(n, ast.AnnAssign)] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node):
        node.annotation = None
        return node


@functools.cache
def _parsed(module: str) -> tuple[dict[str, list[ast.AST]], dict[str, tuple[str, str]]]:
    """A module's definitions by name ("" for what else it does), and what it imports from the package, by alias."""
    definitions, tree = {}, _Code().visit(ast.parse(_SOURCES[module]))
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = []
        else:
            names = [getattr(node, "name", "")]
        for name in names:
            definitions.setdefault(name, []).append(node)
    return definitions, _imports(tree)


def _imports(tree: ast.AST) -> dict[str, tuple[str, str]]:
    """What a program imports from this package: alias to (module, name); the name is empty for a module."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            for alias in node.names:
                module = ".".join([*node.module.split(".")[1:], alias.name])
                if module not in _SOURCES:
                    module = weightsum_lib.EXPORTS.get(alias.name, "") if node.module == PACKAGE.name else ""
                    module = module or node.module.partition(".")[2]
                    found[alias.asname or alias.name] = (module, alias.name)
                else:
                    found[alias.asname or alias.name] = (module, "")
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
            continue
        if name and name not in definitions:
            if name in imports:  # and imported from there
                todo.append((imports[name][0], imports[name][1] or "*"))
                continue
            raise LookupError(f"weightsum_lib.{module} defines no '{name}'")
        nodes = definitions.get(name, [])
        seen[module, name] = "\n".join(map(ast.dump, nodes))
        attributed = set()
        for node in (n for top in nodes for n in ast.walk(top)):  # an attribute comes before the name that it is of
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imports:
                target, inner = imports[node.value.id]
                todo.append((target, inner or node.attr))
                attributed.add(id(node.value))
            elif isinstance(node, ast.Name) and id(node) not in attributed:
                if node.id in imports and (imports[node.id][1] or whole):
                    todo.append((imports[node.id][0], imports[node.id][1] or "*"))
                elif node.id in definitions:
                    todo.append((module, node.id))
            elif isinstance(node, ast.Constant) and node.value in _DATA:
                seen[node.value, ""] = _DATA[node.value]
    return {f"{module}:{name}": code for (module, name), code in sorted(seen.items()) if code}


def code_digest(*roots: str) -> str:
    """A digest of all code that these roots reach (:func:`reached`)."""
    return content_key(reached(*roots))


def attributes(*roots: str) -> set[str]:
    """The names of all attributes that the code which these roots reach reads or sets."""
    return {name for code in reached(*roots).values() for name in re.findall(r"attr='(\w+)'", code)}


def commit() -> str:
    """The commit of the working tree, with "+" where it has changes; "unknown" outside git."""
    try:
        options = {"capture_output": True, "text": True, "check": True, "cwd": PACKAGE}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # on the disk before it has the name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """Write JSON in one piece: the old file or the new one, never half of it."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path):
    """The content of a JSON file; None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _tensors_sha256(tensors: Mapping) -> str:
    import torch  # slow to load, and not wanted where make finds nothing to do

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping, about) -> None:
    """Write tensors by name with their checksum and JSON-able words ``about`` them (safetensors), in one piece."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replaced(path) as temporary:
        save_file(tensors, temporary, {"about": json.dumps(about), "sha256": _tensors_sha256(tensors)})


def read_tensors(path: Path) -> tuple[dict, object] | None:
    """What :func:`write_tensors` has written: tensors and ``about``; None where there is none or it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors, written = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        about = json.loads(written.get("about", ""))
    except (OSError, ValueError, SafetensorError):
        return None
    return (tensors, about) if written.get("sha256") == _tensors_sha256(tensors) else None


def lock(path: Path) -> FileLock:
    """A lock between processes, e.g. so that two notebooks never train at once; a dead process holds none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)
