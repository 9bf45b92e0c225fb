"""A draft as a file: YAML, with why each value is so above it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from pipelines.draft.choices import Choice

_WIDTH = 110
_FLOW: Any = {"default_flow_style": True, "allow_unicode": True, "width": 10_000, "sort_keys": False}


def written(choices: list[Choice], head: list[str]) -> str:
    """The file.

    Args:
        head: lines of what stands above it, as a comment.
    """
    tree: dict[str, Any] = {}
    for choice in choices:  # what comes later of a key stands for it
        node = tree
        *parents, leaf = choice.key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = choice
    return "\n".join([*(f"# {line}".rstrip() for line in head), *_lines(tree, "")]) + "\n"


def _lines(tree: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, entry in tree.items():
        if isinstance(entry, Choice):
            yield from (f"{indent}# {line}" for line in textwrap.wrap(entry.why, _WIDTH))
            written = yaml.safe_dump({key: entry.value}, **_FLOW)
            yield f"{indent}{written.strip().removeprefix('{').removesuffix('}')}"
        else:
            yield f"{indent}{key}:"
            yield from _lines(entry, f"{indent}  ")
