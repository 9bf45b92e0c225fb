"""Every YAML of README.md and docs/ is a part of a configuration that the loader takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.config import parse_config
from dpo_ray.errors import ConfigError
from tests.documented import PAGES, blocks
from tests.unit.config.test_schema import BASE, SCHEMA, Written, complaints

SECTIONS = SCHEMA["properties"].keys()
PARTS = {"reward": ("evaluate.win_rate.reward", "generate.reward")}
"""Blocks that are no sections of a file but a key of some → where they may stand."""
NEEDED = {
    "tune": {"train": {"eval_every_steps": 10}},
    "generate": {"data": {"train": None}, "generate": {"prompts": "p.jsonl"}},
}
"""What an example asks for that the text beside it says."""
BLOCKS = [(page, text) for page in PAGES for text in blocks(page, "yaml")]


def wholes(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Configurations with a block's content at each place where it may stand."""
    if tree.keys() <= SECTIONS:
        return [_with_needed(merged(BASE, tree))]
    [key] = tree
    made = []
    for place in PARTS[key]:
        node = tree[key]
        for name in reversed(place.split(".")):
            node = {name: node}
        made.append(_with_needed(merged(BASE, node)))
    return made


def _with_needed(tree: dict[str, Any]) -> dict[str, Any]:
    for section in tree.keys() & NEEDED.keys():
        tree = merged(tree, NEEDED[section])
    return tree


def merged(tree: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    made = dict(tree)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = merged(made[key], value) if both else value
    return made


def test_there_are_some():
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize(("page", "text"), BLOCKS, ids=lambda value: value.name if isinstance(value, Path) else "")
def test_it_is_loaded_and_valid(page: Path, text: str):
    for tree in wholes(yaml.load(text, Written)):
        assert complaints(tree) == []
    for tree in wholes(yaml.safe_load(text)):
        parse_config(tree)


@pytest.mark.parametrize(
    "text", ["train: {learning_rat: 1.0e-6}", "reward: {type: judg}", "tune: {beta: [0.1], search: best}"]
)
def test_a_mistake_is_found(text: str):
    with pytest.raises(ConfigError):
        for tree in wholes(yaml.safe_load(text)):
            parse_config(tree)
