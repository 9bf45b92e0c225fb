"""The published model's card."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.evaluation.card import model_card

ESTIMATE = {"value": 0.75, "low": 0.5091, "high": 0.8938, "n": 16}
TASKS: list[dict[str, Any]] = [
    {
        "task": "arc_easy",
        "num_fewshot": 25,
        "metric": "acc_norm",
        "higher_is_better": True,
        "base": {"value": 0.5, "stderr": 0.0103, "n": 2376},
        "tuned": {"value": 0.625, "stderr": 0.0099, "n": 2376},
    },
    {
        "task": "<wikitext>",
        "num_fewshot": None,
        "metric": "bits_per_byte",
        "higher_is_better": False,
        "base": {"value": 1.25, "stderr": None, "n": 62},
        "tuned": {"value": None, "stderr": None, "n": 0},
    },
]


@pytest.fixture
def config() -> Config:
    return parse_config({"run": {"name": "brief", "output": "o"}, "model": {"path": "base"}, "data": {"train": "t"}})


def test_the_model_card_names_base_options_and_results(config: Config):
    train = {"first_step_loss": 0.693147, "final": {"loss": 0.51234}}
    card = model_card(config, "run-1", train, {"accuracy": ESTIMATE, "win_rate": None})
    assert card.startswith("---\nlibrary_name: transformers\n")
    for shown in ("# brief", "`base`", "sigmoid", "β = 0.1", "1e-06", "`run-1`", "0.6931", "0.5123"):
        assert shown in card, shown
    assert "| preference accuracy | 0.750 | 0.509 to 0.894 | 16 |" in card
    assert "win rate" not in card


def test_the_card_of_a_loss_without_beta_names_none():
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": "t"}}
    train = {"first_step_loss": 0.5, "final": {"loss": 0.4}}
    orpo = parse_config({**tree, "train": {"loss": {"type": "orpo"}}})
    assert "orpo" in model_card(orpo, "run-1", train, {}) and "β" not in model_card(orpo, "run-1", train, {})
    assert "(β = 0.1," in model_card(parse_config(tree), "run-1", train, {})


def test_the_card_has_benchmark_tasks_where_they_are_measured(config: Config):
    train = {"first_step_loss": 0.693147, "final": {"loss": 0.51234}}
    card = model_card(config, "run-1", train, {"accuracy": ESTIMATE, "tasks": TASKS})
    assert "| preference accuracy | 0.750 | 0.509 to 0.894 | 16 |\n\n| benchmark task" in card
    assert "| arc_easy | acc_norm | 25 | 0.5000 ± 0.0103 | 0.6250 ± 0.0099 | 2376 |\n" in card
    assert "62 and 0 |\n\nLoss: 0.6931" in card
    assert "benchmark" not in model_card(config, "run-1", train, {"accuracy": ESTIMATE})
