"""Content-addressed files: what a result depends on is hashed, and a file is whole or absent."""

import ast
import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

import weightsum_lib

PACKAGE = Path(__file__).parent


def content_key(content) -> str:
    """A short hex digest of JSON-able content; equal content, equal key."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_only(source: str) -> str:
    """The program in a source text: comments, docstrings and layout left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0] = ast.Pass()
    return ast.dump(tree)


def imported_modules(source: str) -> set[str]:
    """The modules of this package that a source text imports, or whose exports it imports, by name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            head, _, rest = node.module.partition(".")
            if head == PACKAGE.name:
                names |= {rest} if rest else {weightsum_lib.EXPORTS.get(alias.name, alias.name) for alias in node.names}
    return {name for name in names if (PACKAGE / f"{name}.py").is_file()}


def source_digest(*modules: str) -> str:
    """A digest of the code of these modules of the package and of all that they import from it.

    Docstrings and comments don't count, nor does this module, which stores results but makes none.
    """
    seen, todo = {}, set(modules)
    while todo:
        name = todo.pop()
        source = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        seen[name] = _code_only(source)
        todo |= imported_modules(source) - set(seen) - {"cache"}
    return content_key(seen)


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
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """Write JSON in one piece: the old file or the new one, never half of it."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path):
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def lock(path: Path) -> FileLock:
    """A lock between processes, e.g. so that two notebooks never train at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)
