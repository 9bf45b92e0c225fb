"""The JSON Schema takes what the loader takes, and refuses what an editor can know to be wrong."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from dpo_ray.config import dump_config, load_config, parse_config
from dpo_ray.config.described import page
from dpo_ray.config.schema import config_schema, written_schema
from dpo_ray.errors import ConfigError
from pipelines.cli import app

ROOT = Path(__file__).parents[3]
SHIPPED = [*sorted((ROOT / "pipelines/configs").glob("*.yaml")), ROOT / "cluster/manifests/kubernetes/site/run.yaml"]
SCHEMA = config_schema()
BASE = {"run": {"name": "x", "output": "out"}, "model": {"path": "m"}, "data": {"train": "d.jsonl"}}


class Written(yaml.SafeLoader):
    """YAML as editors read it: a day is text, and 1e-6 a number."""


Written.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Written.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[+-]?\d+[eE][+-]?\d+$"), list("+-0123456789"))


def complaints(tree: Any, schema: dict[str, Any] = SCHEMA) -> list[str]:
    return [error.json_path for error in jsonschema.Draft202012Validator(schema).iter_errors(tree)]


def tree_with(key: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {name: dict(section) for name, section in BASE.items()}
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return tree


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid_as_written_and_as_resolved(path: Path):
    assert complaints(yaml.load(path.read_text(), Written)) == []
    assert complaints(yaml.load(dump_config(load_config(path)), Written)) == []


RIGHT = [
    ("data.since", date(2026, 11, 1).isoformat()),
    ("data.train", ["a.jsonl", "b.jsonl"]),
    ("data.train", [{"name": "a", "path": "a.jsonl", "weight": 2}, {"name": "b", "path": ["b", "c"], "weight": 1.5}]),
    ("data.rows_per_shard", 12),
    ("model.lora", {"rank": 8, "target_modules": ["q_proj"]}),
    ("model.template_arguments", {"enable_thinking": False}),
    ("evaluate.win_rate.reward", "dpo_ray.rewards:brief_answer"),
    ("evaluate.win_rate.reward", {"type": "reward_model", "path": "m"}),
    ("evaluate.win_rate.reward", [{"function": "a.b:c", "weight": 0.5}, {"type": "judge", "model": "j"}]),
    ("evaluate.sets", {"reward_bench": "data/reward_bench.parquet"}),
    ("train.loss", {"type": "weighted", "terms": [{"weight": 1, "loss": {"type": "kto"}}]}),
    ("train.loss", {"type": "sigmoid", "divergence": {"type": "alpha", "alpha": 0.2}}),
    ("tune", {"beta": [0.1, 0.2], "scheduler": "asha", "rank_by": ["accuracy", "likelihood_drop"]}),
    ("tune", {"space": {"train.epochs": [1, 2], "train": {"learning_rate": {"loguniform": [1e-7, 1e-5]}}}}),
    (
        "tune",
        {"space": {"train.loss": {"choice": [{"type": "ipo", "beta": {"uniform": [0.1, 1]}}, {"type": "sigmoid"}]}}},
    ),
    ("placement", {"engines": {"label_selector": {"pool": "gpu"}, "resources": {"disk": 0.5}}}),
    ("run.hooks", {"on_error": {"url_env": "HOOK"}}),
]


@pytest.mark.parametrize(("key", "value"), RIGHT, ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_loader_takes_is_valid(key: str, value: Any):
    tree = tree_with(key, value)
    assert complaints(tree) == []
    parse_config(tree)


WRONG = [
    ("train.learning_rat", 1e-6),
    ("no_such_section", {}),
    ("train.epochs", "two"),
    ("train.epochs", 0),
    ("train.epochs", 1.5),
    ("train.use_gpu", "sometimes"),
    ("train.strategy", "zero3"),
    ("train.loss", {"beta": 0.1}),
    ("train.loss", {"type": "no_such"}),
    ("train.loss", {"type": "hinge", "label_smoothing": 0.1}),
    ("train.loss", {"type": "sigmoid", "beta": 0}),
    ("model.dtype", "float16"),
    ("data.layout", "no_such"),
    ("data.train", []),
    ("data.train", [{"name": "a"}]),
    ("data.columns", {"promt": "question"}),
    ("data.held_out_fraction", 1),
    ("evaluate.win_rate.reward", "no function"),
    ("evaluate.win_rate.reward", {"path": "m"}),
    ("evaluate.win_rate.reward", {"type": "judge", "function": "a:b"}),
    ("evaluate.sets", {"no name": "a.jsonl"}),
    ("tune", {"space": {"train.epochs": 3}}),
    ("tune", {"space": {"train.epochs": {"uniform": [1]}}}),
    ("tune", {"space": {"train.epochs": {"uniform": [1, 2], "choice": [3]}}}),
    ("tune", {"beta": [0.1], "scheduler": "hyperband"}),
    ("run.name", "a/b"),
    ("run.hooks", {"on_end": {"url_env": "HOOK"}}),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_invalid_the_loader_refuses_too(key: str, value: Any):
    tree = tree_with(key, value)
    assert complaints(tree)
    with pytest.raises(ConfigError):
        parse_config(tree)


@pytest.mark.parametrize("key", ["run", "run.name", "model.path"])
def test_what_is_missing_is_told(key: str):
    tree = tree_with("run.seed", 1)
    section, _, name = key.partition(".")
    tree[section].pop(name) if name else tree.pop(section)
    assert complaints(tree)


def test_every_option_is_described_in_one_line():
    for name, section in SCHEMA["$defs"].items():
        for key, node in section.get("properties", {}).items():
            held = SCHEMA["$defs"].get(node.get("$ref", "").rpartition("/")[2], {})
            about = node.get("description") or held.get("description")
            assert about and "\n" not in about, (name, key)


def test_the_types_of_losses_are_all_there():
    kinds = {node["properties"]["type"]["const"] for name, node in SCHEMA["$defs"].items() if name.endswith("Loss")}
    chosen = {ref["$ref"].rpartition("/")[2] for ref in SCHEMA["$defs"]["Train"]["properties"]["loss"]["oneOf"]}
    assert len(kinds) == len(chosen) > 20


@pytest.mark.parametrize(("name", "options"), [("schema.json", []), ("configuration.md", ["--markdown"])])
def test_what_is_published_is_of_this_tree(name: str, options: list[str]):
    made = CliRunner().invoke(app, ["schema", *options]).output
    assert made == {"schema.json": written_schema(), "configuration.md": page(SCHEMA)}[name]
    assert made == (ROOT / "docs" / name).read_text(), "an option has changed: `make docs` writes the pages anew"


def test_every_key_and_every_link_of_the_page_leads_somewhere():
    text = page(SCHEMA)
    for section in SCHEMA["$defs"].values():
        for key in section.get("properties", {}):
            assert f"| `{key}` |" in text
    headings = re.findall(r"^##+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert len(anchors) == len(headings) and set(re.findall(r"\]\(#([^)]*)\)", text)) <= anchors
