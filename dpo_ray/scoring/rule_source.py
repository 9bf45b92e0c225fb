"""What a reward enters a stage's identity by: its source, so that an edit makes anew what was made with it.

Covered is the definition of the reward and, through any number of steps, every definition of the same module that
it mentions by name: functions, classes, constants, imports as statements, and the module's statements that may change
these, by themselves, by a decorator or by a function that they call. Comments, docstrings, layout and the rest of the
module count for nothing.

Not covered: the modules that it imports, the libraries' versions, files and models that it reads, and names that are
reached by text (getattr, globals). For these a module may hold REWARD_VERSION, text or a whole number, whose value is
part of the identity: raise it by hand, or compute it, as in importlib.metadata.version("judge") or a file's hash.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from dpo_ray.errors import ConfigError
from dpo_ray.scoring.rule import load_function
from dpo_ray.storage.artifact import digest

VERSION = "REWARD_VERSION"
_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def reward_identity(name: str) -> dict[str, str | int]:
    """The entries of a reward in the identity of what is made with it: its name, its source and, if any, its version.

    They are those of when this process first asked, as the module that it has imported is.

    Raises ConfigError where the reward cannot be imported, or its source cannot be found.
    """
    return dict(_identity(name))


def require_same_source(name: str, source: str) -> None:
    """Raises ConfigError where this process has another source of the reward than the driver, which is `source`."""
    here = _identity(name)["reward_source"]
    if here != source:
        raise ConfigError(
            f"The reward {name} has another source on this worker ({here}) than the driver had ({source}): it was "
            "edited after the run began, or the nodes hold different copies. Give all nodes the same file, and run "
            "the same command again; what is finished is kept."
        )


@cache
def _identity(name: str) -> dict[str, str | int]:
    load_function(name)
    module, _, function = name.partition(":")
    source, function = _definition(module, function, name)
    found: dict[str, str | int] = {"reward": name, "reward_source": digest([function, *_reached(source, function)])}
    version = getattr(sys.modules[source.module], VERSION, None)
    if version is not None:
        if not isinstance(version, str | int):
            raise ConfigError(
                f"{VERSION} of {source.module} is a {type(version).__name__}: make it text or a whole number."
            )
        found["reward_version"] = version
    return found


@dataclass(frozen=True)
class _Source:
    """A module's statements, but for those that run only as a program."""

    module: str
    package: str
    statements: list[ast.stmt]

    def binding(self, name: str) -> list[ast.stmt]:
        return [statement for statement in self.statements if name in _bound(statement)]


def _read(module: str, reward: str) -> _Source:
    try:
        spec = importlib.util.find_spec(module)
        get_source = getattr(spec.loader if spec else None, "get_source", None)
        text = get_source(module) if get_source else None
        if spec is not None and text is not None:
            statements = [s for s in ast.parse(text).body if not _is_main(s)]
            return _Source(module, spec.parent or "", statements)
        why = "it has none beside its compiled form"
    except (ImportError, SyntaxError, ValueError) as error:
        why = str(error)
    raise ConfigError(
        f"The reward {reward} cannot be told from an earlier one, for its module {module} has no source that can be "
        f"read ({why}). {_way_out(reward)}"
    )


def _definition(module: str, name: str, reward: str) -> tuple[_Source, str]:
    """Where a name is defined: here, or where it is imported from."""
    source = _read(module, reward)
    binding = source.binding(name)
    if not binding:
        raise ConfigError(
            f"The reward {reward} cannot be told from an earlier one, for no statement of {module} defines {name}. "
            f"{_way_out(reward)}"
        )
    last = binding[-1]
    if isinstance(last, ast.ImportFrom):
        origin = next(alias.name for alias in last.names if (alias.asname or alias.name) == name)
        relative = "." * last.level + (last.module or "")
        return _definition(importlib.util.resolve_name(relative, source.package), origin, reward)
    if any(name in _bound(node) for node in _at_module_level(last) if isinstance(node, ast.ImportFrom)):
        raise ConfigError(
            f"The reward {reward} cannot be told from an earlier one, for {name} is imported in a branch of {module}. "
            f"{_way_out(reward)}"
        )
    if isinstance(last, ast.Assign | ast.AnnAssign) and _is_imported(last.value, source):
        raise ConfigError(
            f"The reward {reward} cannot be told from an earlier one, for in {module} {name} is but another name of "
            f"what it imports. {_way_out(reward)}"
        )
    return source, name


def _way_out(reward: str) -> str:
    return f"In place of {reward} name the module that holds its code, or define a function that calls it."


def _is_imported(value: ast.expr | None, source: _Source) -> bool:
    """Whether this is a name, or an attribute of one, that an import binds."""
    if not isinstance(value, ast.Name | ast.Attribute):
        return False
    root = _root(value)
    return any(
        root in _bound(node)
        for statement in source.statements
        for node in _at_module_level(statement)
        if isinstance(node, ast.Import | ast.ImportFrom)
    )


def _reached(source: _Source, name: str) -> list[Any]:
    """The statements that a definition depends on, itself included, in their order and without what means nothing."""
    bound = [_bound(statement) for statement in source.statements]
    mentioned = [_mentioned(statement) & set().union(*bound) for statement in source.statements]
    changed = [_may_change(statement, source) for statement in source.statements]
    wanted, covered = {name}, set[int]()
    grows = True
    while grows:
        grows = False
        for i in range(len(source.statements)):
            if i not in covered and ("*" in bound[i] or (bound[i] | changed[i]) & wanted):
                covered.add(i)
                wanted |= mentioned[i]
                grows = True
    return [_plain(source.statements[i]) for i in sorted(covered)]


def _may_change(statement: ast.stmt, source: _Source) -> set[str]:
    """Names whose values a statement may change without binding them, as WORDS.update(…), fill() or @register do.

    A statement that defines nothing is there for what it changes, as random.seed(1). Of others that call the standard
    library, as re.compile(…), none changes it; any other module may keep what it is given for all that is imported from
    there.
    """
    meant: set[str] = set()
    if isinstance(statement, (ast.Expr, *_BRANCHES)):
        names = meant = _mentioned(statement)
    elif isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
        names = set[str]().union(*map(_mentioned, statement.decorator_list))
    elif any(isinstance(node, ast.Call) for node in _at_module_level(statement)):
        names = _mentioned(statement)
    else:
        return set()
    origins = _origins(source)
    # What it calls may change what is mentioned there, and so on.
    found, todo = set(names), list(names)
    while todo:
        called = todo.pop()
        if called not in origins:
            new = set[str]().union(*(_mentioned(s) for s in source.binding(called))) - found
            found |= new
            todo += new
    keepers = {origins[name] for name in found if name in origins} - sys.stdlib_module_names
    own = {name for name in found if name not in origins}
    return meant | own | {name for name, origin in origins.items() if origin in keepers}


def _origins(source: _Source) -> dict[str, str]:
    """Names that the module imports, each with the first part of the name of the module that it comes from."""
    found: dict[str, str] = {}
    for node in source.statements:
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name.split(".")[0]: a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = (node.module or "").split(".")[0] if not node.level else "." * node.level + (node.module or "")
            found |= {a.asname or a.name: origin for a in node.names}
    return found


def _at_module_level(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of a statement whose names are the module's: not those inside a function or a class."""
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)


def _bound(statement: ast.AST) -> set[str]:
    """Names of the module that a statement defines, or parts of which it sets; `*` for all that a module holds."""
    names: set[str | None] = set()
    for node in _at_module_level(statement):  # type: ignore[arg-type]
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Import() | ast.ImportFrom():
                names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
            case ast.Name(ctx=ast.Store() | ast.Del()):
                names.add(node.id)
            case ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del()):
                names.add(_root(node))
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
                names.add(node.name)
            case ast.MatchMapping():
                names.add(node.rest)
    return {name for name in names if name}


def _mentioned(statement: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Global):
            names |= set(node.names)
    return names


def _root(node: ast.AST) -> str | None:
    """The name that a chain of attributes and items begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_main(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) in {
        "__name__ == '__main__'",
        "'__main__' == __name__",
    }


def _plain(node: Any) -> Any:
    """A syntax tree as lists and text, the same under every version of Python: without docstrings and empty fields."""
    if isinstance(node, list):
        return [_plain(item) for item in node if not _is_text(item)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {key: value for key, value in ast.iter_fields(node) if key not in {"kind", "type_comment"}}
    return [type(node).__name__, {key: _plain(value) for key, value in fields.items() if value not in (None, [])}]


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
