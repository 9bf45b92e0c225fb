"""YAML as people write it: a key that stands twice is told, where YAML's own reader takes the last one."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in first:
                raise yaml.constructor.ConstructorError(
                    "in a section",
                    node.start_mark,
                    f"{key.value} stands twice, first in line {first[key.value].start_mark.line + 1}: put what is "
                    "below both under one",
                    key.start_mark,
                )
            first[key.value] = key
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Plain values. Raises yaml.YAMLError, also where a key stands twice; ValueError on dates that there are not."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader
