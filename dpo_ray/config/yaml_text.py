"""YAML as people write it: a key that stands twice is told, where YAML's own reader takes the last one."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before what `<<` names is put into it
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (earlier := first.setdefault((key.tag, key.value), key)) is not key:
                raise yaml.composer.ComposerError(
                    "in a section",
                    node.start_mark,
                    f"{key.value} stands twice, first in line {earlier.start_mark.line + 1}: put what is below both "
                    "under one",
                    key.start_mark,
                )
        return node


def read_yaml(text: str) -> Any:
    """Plain values. Raises yaml.YAMLError, also where a key stands twice; ValueError on dates that there are not."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader
