"""Which lines of the project's packages have run, in whatever process: each marks a byte of a file before it runs.

coverage.py reports on these marks, but its tracer does not make them. On Python 3.11 that one slows all of a process
down, what it imports included (by a third, where a process mostly imports), and it saves when a process ends, while Ray
ends its workers by SIGKILL. A mark in a mapped file costs nothing elsewhere and outlives its process.
"""

from __future__ import annotations

import ast
import hashlib
import marshal
import mmap
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

FOLDER = "DPO_RAY_COVERAGE"
"""In the environment: the folder of the marks."""
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dpo_ray", "pipelines", "tuning", "cluster")

_MARKS = "__marks__"  # a module's global


def install() -> None:
    """Let modules of the packages that are imported from now on mark their lines."""
    sys.meta_path.insert(0, _Finder)


def lines_run(source: Path) -> list[int]:
    """Numbers of the lines of a source file that have run."""
    file = _file(source, source.read_bytes(), "marks")
    return [n for n, mark in enumerate(file.read_bytes()) if mark] if file.exists() else []


class _Marks(mmap.mmap):
    """Bytes by line number. Functions that are pickled by value take theirs along, by name."""

    path: Path

    def __reduce__(self) -> Any:
        return _open, (self.path, len(self))


def _open(path: Path, size: int) -> _Marks:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.ftruncate(file, size)
        marks = _Marks(file, size)
    finally:
        os.close(file)
    marks.path = path
    return marks


def _file(source: Path, content: bytes, kind: str) -> Path:
    """Where something of a source file is kept, as long as its content is the same."""
    name = ".".join(source.relative_to(ROOT).with_suffix("").parts)
    return Path(os.environ[FOLDER]) / f"{name}.{hashlib.sha256(content).hexdigest()[:12]}.{kind}"


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            source = Path(spec.loader.path).resolve()
            if source.is_relative_to(ROOT):
                spec.loader = _Loader(name, str(source))
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        content = self.get_data(self.path)
        vars(module)[_MARKS] = _open(_file(Path(self.path), content, "marks"), content.count(b"\n") + 2)
        super().exec_module(module)

    def path_stats(self, path: Any) -> Any:
        raise OSError("Python's own cache is of the code without marks")

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        cached = _file(Path(self.path), data, f"{sys.implementation.cache_tag}.code")
        if cached.exists():
            return marshal.loads(cached.read_bytes())
        code = compile(marking(ast.parse(data, path)), path, "exec", dont_inherit=True, optimize=_optimize)
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_bytes(marshal.dumps(code))
        partial.replace(cached)
        return code


def marking(tree: ast.Module) -> ast.Module:
    """The same program, with each statement's lines marked before it."""
    for node in list(ast.walk(tree)):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, list(_marked(node, block, first=name == "body")))
    return ast.fix_missing_locations(tree)


def _marked(parent: ast.AST, block: list[ast.stmt], first: bool) -> Iterator[ast.stmt]:
    if first and isinstance(parent, ast.ExceptHandler):
        yield _mark(parent.lineno, block[0])
    if first and isinstance(parent, ast.match_case):
        yield _mark(parent.pattern.lineno, block[0])
    unmarked: list[int] = []  # lines that nothing may stand before
    for place, statement in enumerate(block):
        if _is_future(statement):
            unmarked.append(statement.lineno)
        elif not (first and place == 0 and _is_docstring(parent, statement)):
            decorators = [decorator.lineno for decorator in getattr(statement, "decorator_list", [])]
            for line in (*unmarked, *decorators, statement.lineno):
                yield _mark(line, statement)
            unmarked = []
        yield statement


def _mark(line: int, before: ast.stmt) -> ast.stmt:
    [mark] = ast.parse(f"{_MARKS}[{line}] = 1").body
    for node in ast.walk(mark):
        ast.copy_location(node, before)
    return mark


def _is_docstring(parent: ast.AST, statement: ast.stmt) -> bool:
    holds = isinstance(parent, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return holds and is_text and isinstance(statement.value.value, str)


def _is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
