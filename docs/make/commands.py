"""The commands of `dpo-ray`, with their arguments and options, as typer has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from pipelines.cli import app

_HEAD = """\
# Commands

Made by `make docs` from the commands themselves; `dpo-ray COMMAND --help` says the same. `CONFIG` is a YAML file
([Configuration](configuration.md)); [exit codes](results.md#exit-codes) are the same for all.
"""


def page() -> str:
    """Markdown of all commands."""
    lines = [_HEAD, "| command | |", "|---|---|"]
    found = list(_commands(typer.main.get_command(app), "dpo-ray"))
    lines += [f"| [`{name}`](#{name.replace(' ', '-')}) | {_first(command)} |" for name, command in found]
    for name, command in found:
        lines += ["", f"## {name}", "", *_told(command)]
    return "\n".join(lines).rstrip() + "\n"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for key, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from _commands(child, f"{name} {key}")
        elif not child.hidden:
            yield f"{name} {key}", child


def _first(command: Any) -> str:
    return " ".join((command.help or "").split("\n\n")[0].split()).replace("|", r"\|")


def _told(command: Any) -> Iterator[str]:
    yield from ("\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n")), "")
    yield from ("| | default | |", "|---|---|---|")
    for one in command.params:
        if one.param_type_name == "argument":
            name = f"`{one.name.upper()}`"
        else:
            name = ", ".join(f"`{written}`" for written in (*one.opts, *one.secondary_opts))
        variable = f" Or by `{one.envvar}`." if one.envvar else ""
        about = f"{' '.join((getattr(one, 'help', None) or '').split())}{variable}".replace("|", r"\|").replace(
            "<", "&lt;"
        )
        yield f"| {name} | {_default(one)} | {about} |"


def _default(one: Any) -> str:
    if one.required:
        return "required"
    value = one.default
    if value is None or value == () or value is False or callable(value):
        return ""
    return f"`{value}`"
