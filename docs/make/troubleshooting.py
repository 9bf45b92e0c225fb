"""Every message that ends a run, by exit code and by room: read from the `raise` statements of the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dpo_ray import errors

ROOT = Path(__file__).parents[2]
_PACKAGES = ("dpo_ray", "tuning", "pipelines", "cluster")
_KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type)
    and issubclass(kind, errors.DpoRayError)
    and kind not in {errors.DpoRayError, errors.DamagedCheckpoint}  # training goes on from the one before
} | {"DpoRayError": errors.DpoRayError}
_IN_CONFIG = "ValueError"
"""What validators of the configuration raise, which the loader tells as ConfigError with the key before it."""
_GAP = "…"
_CODES = {
    1: ("Unexpected", "Something outside failed: a store, a server, a process."),
    2: (
        "Configuration or usage",
        "What the run was told to do cannot work. Mostly nothing was computed yet.",
    ),
    3: (
        "Data, or a reference that does not match",
        "The rows, the model's files or the scores are not what they have to be.",
    ),
    4: ("The gate", "The model is there and measured, but was not published. The report has the conditions."),
    75: ("Another run is at it", "This one was told to leave."),
    130: ("Ctrl-C", "What is finished is kept."),
    143: ("SIGTERM", "What is finished is kept."),
}
"""Exit code → its title, and what it says."""
_HEAD = """\
# Troubleshooting

Made by `make docs` from the messages in the code. Look for a few words of yours, without its values: here they
are ‹names›, or … where a part differs from case to case.

1. Read the last paragraph that was printed: it says the value, the limit and the way out. `log.txt` in the run's
   folder has it too.
2. Mend that, and run **the same command again**. What is finished is taken over.
3. `dpo-ray doctor CONFIG` looks at machines, packages, store, data and models at once, and tells all that is wrong.
4. `DPO_RAY_TRACEBACK=1` puts the whole traceback before the paragraph, the worker's included.

[Exit codes](results.md#exit-codes) are those of the sections below; [Failures](failures.md) has what dies, and
what that costs.
"""


@dataclass(frozen=True, order=True)
class Message:
    """What one `raise` says."""

    code: int
    room: str
    text: str


def page() -> str:
    """Markdown of all messages."""
    found = sorted(set(messages()))
    lines = [_HEAD]
    for code, (title, about) in _CODES.items():
        kinds = sorted(name for name, kind in _KINDS.items() if kind.exit_code == code)
        lines += [f"## Exit code {code}: {title}", "", f"{about} ({', '.join(f'`{kind}`' for kind in kinds)})", ""]
        for room in dict.fromkeys(one.room for one in found if one.code == code):
            lines += [f"### Exit code {code} in `{room}`", "", "| message | way out |", "|---|---|"]
            for one in found:
                if (one.code, one.room) == (code, room):
                    said, way_out = split(one.text)
                    lines.append(f"| {_cell(said)} | {_cell(way_out)} |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


@cache
def messages() -> tuple[Message, ...]:
    """Of every `raise` of an error that the command line ends with, but those that only pass another message on."""
    found = []
    for package in _PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            path = file.relative_to(ROOT)
            room = str(path.parent) if path.parts[0] == "dpo_ray" and len(path.parts) > 2 else path.parts[0]
            for kind, text in raised(file.read_text(encoding="utf-8"), in_config="config" in path.parts):
                found.append(Message(_KINDS[kind].exit_code, room, text))
    return tuple(found)


def raised(source: str, *, in_config: bool = False) -> Iterator[tuple[str, str]]:
    """Kind of error and message, of each `raise` in a source. in_config: whether ValueError is told to people, too."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    tree = _Filled(_constants(tree, imported=True) | _made_by(functions)).visit(tree)
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.FunctionDef):
            continue
        for node in _own(scope):
            made = node.exc if isinstance(node, ast.Raise) else None
            if not (isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.args):
                continue
            kind = "ConfigError" if in_config and made.func.id == _IN_CONFIG else made.func.id
            if kind not in _KINDS:
                continue
            for text in _texts(made.args[0], scope, functions):
                if _words(text) >= 3:
                    yield kind, text


def split(text: str) -> tuple[str, str]:
    """What went wrong, and the way out, or "": the last sentence of a message, or what is behind its last colon."""
    for mark in (r"(?<=[.\])…›] )(?=[A-Z‹-])", r"(?<=: )", r"(?<=; )"):
        cuts = [cut.end() for cut in re.finditer(mark, text) if _open(text, cut.end()) == 0]
        if cuts and len(text) - cuts[-1] > 8:
            said, way_out = text[: cuts[-1]].rstrip(" :;"), text[cuts[-1] :]
            if _words(way_out) > 1 and (_words(said) > 2 or said.endswith(".")):
                return said, way_out[0].upper() + way_out[1:]
    return text, ""


def _words(text: str) -> int:
    """Words that do not differ from case to case."""
    return len(re.findall(r"\w{2,}", re.sub(r"‹[^›]*›", "", text)))


def _open(text: str, at: int) -> int:
    """Brackets that are open, and backticks that hold code, at a place."""
    before = text[:at]
    return sum(before.count(left) - before.count(right) for left, right in ("()", "[]", "{}")) + before.count("`") % 2


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function, but not those of functions within it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            yield child
            yield from _own(child)


def _texts(node: ast.expr, scope: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """What a message may be: a text as it stands, or one by name or made by a function of the file."""
    if isinstance(node, ast.Name):
        given = [
            one.value
            for one in _own(scope)
            if isinstance(one, ast.Assign) and any(isinstance(to, ast.Name) and to.id == node.id for to in one.targets)
        ]
        return [_rendered(value) for value in given if not isinstance(value, ast.Name)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
        made = functions[node.func.id]
        return [_rendered(one.value) for one in _own(made) if isinstance(one, ast.Return) and one.value is not None]
    return [_rendered(node)]


def _constants(tree: ast.Module, *, imported: bool = False) -> dict[str, ast.expr]:
    """Name → what a file sets it to at its top. imported: with those that it imports from other files of ours."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    for node in ast.walk(tree):  # what is heavy is imported inside of functions
        if imported and isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_PACKAGES):
            file = (ROOT / (node.module or "").replace(".", "/")).with_suffix(".py")
            if file.is_file():
                theirs = _constants_of(file)
                found |= {one.asname or one.name: theirs[one.name] for one in node.names if one.name in theirs}
    return found


@cache
def _constants_of(file: Path) -> dict[str, ast.expr]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return _constants(_Filled(_constants(tree)).visit(tree))


def _made_by(functions: dict[str, ast.FunctionDef]) -> dict[str, ast.expr]:
    """Function of a file → the text that it returns, of those that return one and no other."""
    found = {}
    for name, function in functions.items():
        returned = [node.value for node in _own(function) if isinstance(node, ast.Return)]
        if len(returned) == 1 and isinstance(returned[0], ast.Constant | ast.JoinedStr):
            found[name] = returned[0]
    return found


class _Filled(ast.NodeTransformer):
    """Texts that a file has by name, or its functions make, put where they are named in a message."""

    def __init__(self, constants: dict[str, ast.expr]):
        self._texts = {
            name: value for name, value in constants.items() if isinstance(value, ast.Constant | ast.JoinedStr)
        }

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.expr:
        named = node.value.func if isinstance(node.value, ast.Call) else node.value
        value = self._texts.get(named.id) if isinstance(named, ast.Name) else None
        return value if value is not None else node


def _rendered(node: ast.expr) -> str:
    """A text with names for what is filled in."""
    match node:
        case ast.Constant(value=str() | int() as value):
            made = str(value)
        case ast.JoinedStr(values=values):
            made = "".join(_rendered(value) for value in values)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.FormattedValue(value=ast.Attribute(attr=name)):
            made = f"‹{name.strip('_')}›"
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            made = _rendered(left) + _rendered(right)
        case _:
            made = _GAP
    return re.sub(r"\s+", " ", made)


def _cell(text: str) -> str:
    """As a table's cell shows it, code left as it is."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", r"\|"))
    return "".join(
        one if one.startswith("`") else one.replace("*", r"\*").replace("<", "&lt;") for one in parts
    ).strip()
