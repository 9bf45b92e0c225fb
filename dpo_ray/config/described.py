"""The configuration as a page to read: each section a table of its keys, made from the schema."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

_HEAD = """\
# Configuration

Made by `dpo-ray schema --markdown` from the tree in `dpo_ray/config`; editors take [schema.json](schema.json).

A configuration is one YAML file with the sections below. `-o dotted.key=value` sets a key over what the file says, and
`--dry-run` prints the file with every default. A key that is not here is an error, and so is a combination that cannot
work. Where a default is a section, its keys have their own.
"""
_TYPES = {"string": "text", "number": "number", "integer": "whole number", "boolean": "true, false", "null": "null"}
_LIMITS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}

Node = Mapping[str, Any]


def page(schema: Node) -> str:
    """Markdown of a schema as dpo_ray.config.schema makes it."""
    found = _Sections(schema)
    lines = [_HEAD]
    for name, heading in found.headings().items():
        section = schema["$defs"][name]
        level = "##" if "." not in heading.partition("`,")[0] else "###"
        lines += [f"{level} {heading}", ""]
        lines += [f"{_cell(section['description'])}", ""] if "description" in section else []
        lines += [*_table(section, found), ""]
    return "\n".join(lines).rstrip() + "\n"


class _Sections:
    """Where each section stands in a file."""

    def __init__(self, schema: Node):
        self._defs: Node = schema["$defs"]
        self._paths: dict[str, list[str]] = {}
        self._chosen: dict[str, str] = {}
        """Sections among several that may stand in a place → the key and value that choose it."""
        for key, node in schema["properties"].items():
            self._visit(node, key, ())

    def headings(self) -> dict[str, str]:
        """Section → its heading. Those with the same keys at several places are one."""
        alike: dict[str, list[str]] = {}
        for name in self._paths:
            alike.setdefault(str(self._defs[name]["properties"]), []).append(name)
        return {same[0]: self._heading(same) for same in alike.values()}

    def link(self, name: str) -> str:
        """To the table of a section, in the words of its heading."""
        if "properties" not in self._defs[name]:
            return "mapping"
        mine = self._defs[name]["properties"]
        heading = next(text for other, text in self.headings().items() if self._defs[other]["properties"] == mine)
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        return f"[{self._chosen.get(name, 'section')}](#{anchor})"

    def _heading(self, names: list[str]) -> str:
        paths = list(dict.fromkeys(path for name in names for path in self._paths[name]))
        chosen = f" with {self._chosen[names[0]]}" if names[0] in self._chosen else ""
        return f"{', '.join(f'`{path}`' for path in paths)}{chosen}"

    def _visit(self, node: Any, path: str, above: tuple[str, ...]) -> None:
        if isinstance(node, list):
            for one in node:
                self._visit(one, path, above)
            return
        if (ref := _ref(node)) is not None:
            if ref in above:
                return
            target = self._defs[ref]
            if "properties" in target:
                if any(path.startswith(f"{other}.") for other in self._paths.get(ref, ())):
                    return  # a loss that stands in a sum of losses is described once
                self._paths.setdefault(ref, []).append(path)
                for key, child in target["properties"].items():
                    self._visit(child, f"{path}.{key}", (*above, ref))
            else:
                self._visit(target, path, (*above, ref))
            return
        several = [name for one in _alternatives(node) if (name := _ref(one)) is not None]
        for name in several if len(several) > 1 else ():
            self._chosen.setdefault(name, _choosing(self._defs[name]))
        for key in ("anyOf", "oneOf"):
            self._visit(node.get(key, []), path, above)
        if "items" in node:
            self._visit(node["items"], path, above)
        for child in node.get("patternProperties", {}).values():
            self._visit(child, f"{path}.…", above)


def _choosing(section: Node) -> str:
    kind = section.get("properties", {}).get("type", {}).get("const")
    return f"`type: {kind}`" if kind is not None else f"`{next(iter(section.get('properties', {'…': 0})))}`"


def _table(section: Node, found: _Sections) -> Iterator[str]:
    yield "| key | type | default | limits | |"
    yield "|---|---|---|---|---|"
    for key, node in section["properties"].items():
        limits = ", ".join(dict.fromkeys(_limits(node)))
        default = "required" if key in section.get("required", ()) else _default(node)
        about = _cell(node.get("description", ""))
        yield f"| `{key}` | {' or '.join(dict.fromkeys(_types(node, found)))} | {default} | {limits} | {about} |"


def _types(node: Node, found: _Sections) -> Iterator[str]:
    if (ref := _ref(node)) is not None:
        yield found.link(ref)
    elif "const" in node:
        yield f"`{node['const']}`"
    elif "enum" in node:
        yield ", ".join(f"`{value}`" for value in node["enum"])
    elif alternatives := _alternatives(node):
        for one in alternatives:
            yield from _types(one, found)
    elif node.get("type") == "array" and "prefixItems" in node:
        yield f"[{', '.join(' or '.join(_types(one, found)) for one in node['prefixItems'])}]"
    elif node.get("type") == "array":
        items = " or ".join(dict.fromkeys(_types(node["items"], found))) if node.get("items") else "anything"
        yield f"list of {items}"
    elif node.get("type") == "object":
        values = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
        held = " or ".join(dict.fromkeys(_types(values[0], found))) if isinstance(values[0], dict) else "anything"
        yield f"mapping to {held}"
    elif node.get("format") == "date":
        yield "date"
    else:
        yield _TYPES[node["type"]]


def _limits(node: Node) -> Iterator[str]:
    bounds = [form.format(f"{node[name]:g}") for name, form in _LIMITS.items() if name in node]
    if bounds:
        yield " and ".join(bounds)
    if node.get("minItems") or node.get("minLength"):
        yield "not empty"
    if "pattern" in node:
        yield f"`{_bars(node['pattern'])}`"
    inner = [*_alternatives(node), node.get("items"), node.get("additionalProperties")]
    for child in [*inner, *node.get("prefixItems", ())]:
        yield from _limits(child) if isinstance(child, dict) else ()


def _default(node: Node) -> str:
    if "default" not in node:
        return ""
    written = yaml.safe_dump(node["default"], default_flow_style=True, allow_unicode=True, width=1000)
    return f"`{_bars(written.removesuffix('...' + chr(10)).strip())}`"


def _alternatives(node: Node) -> list[Node]:
    return [*node.get("anyOf", ()), *node.get("oneOf", ())]


def _ref(node: Node) -> str | None:
    return node["$ref"].rpartition("/")[2] if "$ref" in node else None


def _bars(text: str) -> str:
    return text.replace("|", r"\|")


def _cell(text: str) -> str:
    return _bars(text).replace("<", "&lt;").replace("*", r"\*")
