"""The Python API: what `dpo_ray.api` says of itself, its functions and what they return."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import groupby, pairwise
from typing import Any

from dpo_ray import api

_HEAD = """\
# Python

Made by `make docs` from `dpo_ray.api`. Two examples that tests run, as scripts and as notebooks:
[a reward and data of one's own](examples/own_reward.ipynb), and [a sweep](examples/sweep.ipynb).
"""
_WIDTH = 120
_ELSEWHERE = {
    "Config": "The configuration: [every option](configuration.md).",
    "DpoRayError": "[Failures](failures.md).",
}


def page() -> str:
    """Markdown of all names of `dpo_ray.api`."""
    lines = [_HEAD, *_prose(inspect.getdoc(api) or "")]
    things = sorted((getattr(api, name) for name in api.__all__ if name not in _ELSEWHERE), key=_line)
    for title, wanted, told in (
        ("Functions", inspect.isfunction, _function),
        ("What they return", is_dataclass, _class),
    ):
        lines += ["", f"## {title}"]
        for thing in filter(wanted, things):
            lines += ["", f"### {thing.__name__}", "", *told(thing)]
    lines += ["", "## What others have too", ""]
    lines += [f"- `{name}`: {told}" for name, told in _ELSEWHERE.items()]
    return "\n".join(lines).rstrip() + "\n"


def _line(thing: Any) -> int:
    return inspect.getsourcelines(thing)[1]


def _function(function: Any) -> Iterator[str]:
    yield from ("```python", _signature(function), "```", "")
    yield from _prose(inspect.getdoc(function) or "")


def _signature(function: Any) -> str:
    """As the formatter of the project's code leaves it."""
    arguments, _, returned = str(inspect.signature(function)).replace("'", "")[1:].rpartition(") -> ")
    line = f"def {function.__name__}({arguments}) -> {returned}: ..."
    if len(line) <= _WIDTH:
        return line
    return f"def {function.__name__}(\n    {arguments}\n) -> {returned}: ..."


def _class(of: Any) -> Iterator[str]:
    yield from _prose(inspect.getdoc(of) or "")
    base = next((x for x in of.__bases__ if is_dataclass(x)), None)
    inherited = {field.name for field in fields(base)} if base is not None else set()
    if base is not None:
        yield from ("", f"It has what `{base.__name__}` has, and:")
    about = _of_fields(of)
    yield from ("", "| field | type | |", "|---|---|---|")
    for field in fields(of):
        if field.name not in inherited:
            kind = str(field.type).replace("|", r"\|")
            yield f"| `{field.name}` | `{kind}` | {about.get(field.name, '')} |"


def _of_fields(of: Any) -> dict[str, str]:
    """Field → the string below it."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(of))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(told.value.value.split())
        for field, told in pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(told, ast.Expr)
        and isinstance(told.value, ast.Constant)
        and isinstance(told.value.value, str)
    }


def _prose(text: str) -> Iterator[str]:
    """A docstring as Markdown; what is indented is code."""
    for is_code, blocks in groupby(text.split("\n\n"), key=lambda block: block.startswith("    ")):
        if is_code:
            yield from ("```python", *textwrap.dedent("\n\n".join(blocks)).splitlines(), "```", "")
            continue
        for block in blocks:
            yield from _paragraph(block)


def _paragraph(block: str) -> Iterator[str]:
    if block.startswith("Args:\n"):
        yield from (*_arguments(block), "")
    else:
        yield from (*block.splitlines(), "")


def _arguments(block: str) -> Iterator[str]:
    for line in textwrap.dedent(block.removeprefix("Args:\n")).splitlines():
        name, colon, told = line.partition(": ")
        yield f"- `{name}`: {told}" if colon and not line.startswith(" ") else f"  {line.strip()}"
