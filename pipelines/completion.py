"""What a shell completes after -o: keys of the configuration, and their values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import yaml

_SHELL = "_DPO_RAY_COMPLETE"
"""By which typer's scripts ask for completions."""
_KEY = "_DPO_RAY_COMPLETED_KEY"
"""The key whose value is asked for, where the shell has cut it off."""

Node = Mapping[str, Any]


@dataclass
class _Option:
    about: str
    values: list[str] = field(default_factory=list)
    """Its default first, then others; none where it has neither."""


def overrides(incomplete: str) -> list[tuple[str, str]]:
    """Texts that begin so, each with what it is about: dotted keys with `=`, and of one key alone its values."""
    options = _options()
    if (key := os.environ.get(_KEY)) is not None:
        found = options.get(key)
        return [(value, found.about) for value in found.values] if found is not None else []
    key, separator, _ = incomplete.partition("=")
    matching = [one for one in options if one == key or (not separator and one.startswith(key))]
    if len(matching) > 1 and not separator:
        return [(f"{one}=", options[one].about) for one in matching]
    return [(f"{one}={value}", options[one].about) for one in matching for value in options[one].values or [""]]


def mend_words(environ: MutableMapping[str, str]) -> None:
    """bash cuts words at `=`, and replaces what stands behind it alone: put together what was one word, and have the
    value asked for by itself."""
    if environ.get(_SHELL) != "complete_bash" or "COMP_WORDS" not in environ:
        return
    words = environ["COMP_WORDS"].split("\n")
    at = int(environ.get("COMP_CWORD", len(words) - 1))
    words, at = [*words[: at + 1], *([""] * (at + 1 - len(words)))], at
    if words[at] == "=" and at:
        words.append("")
    if len(words) > 2 and words[-2] == "=":
        environ[_KEY] = words[-3]
        words = [*words[:-3], words[-1]]
    joined: list[str] = []
    for word in words:
        if word == "=" and joined:
            joined[-1] += "="
        elif joined and joined[-1].endswith("="):
            joined[-1] += word
        else:
            joined.append(word)
    environ["COMP_WORDS"], environ["COMP_CWORD"] = "\n".join(joined), str(len(joined) - 1)


def _options() -> dict[str, _Option]:
    from dpo_ray.config.schema import config_schema

    schema = config_schema()
    found: dict[str, _Option] = {}
    for key, node in schema["properties"].items():
        _collect(node, key, schema["$defs"], (), found)
    return found


def _collect(node: Node, key: str, sections: Node, above: tuple[str, ...], found: dict[str, _Option]) -> None:
    """Add a key, where it has values of its own, and those below it. A list has none: -o does not reach into it."""
    alternatives = list(_alternatives(node))
    values: list[str] = []
    is_value = False
    for one in alternatives:
        name = one["$ref"].rpartition("/")[2] if "$ref" in one else None
        if name is None:
            is_value = is_value or one.get("type") != "null"
            values += _values(one)
        elif "properties" not in sections[name]:
            is_value = True
        elif name not in above:
            for inner, child in sections[name]["properties"].items():
                _collect(child, f"{key}.{inner}", sections, (*above, name), found)
    if not is_value:
        return
    if node.get("default") is not None and "const" not in node:
        values.insert(0, _written(node["default"]))
    option = found.setdefault(key, _Option(node.get("description", "").partition(". ")[0].rstrip(".")))
    option.values = list(dict.fromkeys([*option.values, *values]))


def _alternatives(node: Node) -> Iterator[Node]:
    inner = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    if not inner:
        yield node
    for one in inner:
        yield from _alternatives(one)


def _values(node: Node) -> list[str]:
    if "const" in node:
        return [str(node["const"])]
    if "enum" in node:
        return [str(value) for value in node["enum"]]
    return ["true", "false"] if node.get("type") == "boolean" else ["null"] if node.get("type") == "null" else []


def _written(value: Any) -> str:
    """As YAML has it in one line, and in one word of a shell."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return text.replace(", ", ",") if ": " not in text else f"'{text}'"
