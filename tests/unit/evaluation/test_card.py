"""The published model's card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dpo_ray.config import Config, parse_config
from dpo_ray.evaluation.card import hub_model, licence_of, model_card

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
    for shown in ("# brief", "`base`", "sigmoid", "| β | 0.1 |", "1e-06", "`run-1`", "0.6931", "0.5123"):
        assert shown in card, shown
    assert "| preference accuracy | 0.750 | 0.509 to 0.894 | 16 |" in card
    assert "win rate" not in card


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"first_step_loss": 0.693147, "final": {"step": 9, "skipped": 1}}, "Loss: 0.6931 at the first step.\n"),
        ({"first_step_loss": None, "final": {"step": 9, "skipped": 1}}, None),
    ],
    ids=["the last step", "every step"],
)
def test_the_card_of_a_training_that_left_steps_out(config: Config, train: dict[str, Any], told: str | None):
    card = model_card(config, "run-1", train, {"accuracy": ESTIMATE})
    assert told in card if told else "Loss:" not in card


def test_the_card_of_a_loss_without_beta_names_none():
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": "t"}}
    train = {"first_step_loss": 0.5, "final": {"loss": 0.4}}
    orpo = parse_config({**tree, "train": {"loss": {"type": "orpo"}}})
    assert "orpo" in model_card(orpo, "run-1", train, {}) and "β" not in model_card(orpo, "run-1", train, {})
    assert "| β | 0.1 |" in model_card(parse_config(tree), "run-1", train, {})


def test_the_card_has_benchmark_tasks_where_they_are_measured(config: Config):
    train = {"first_step_loss": 0.693147, "final": {"loss": 0.51234}}
    card = model_card(config, "run-1", train, {"accuracy": ESTIMATE, "tasks": TASKS})
    assert "| preference accuracy | 0.750 | 0.509 to 0.894 | 16 |\n\n| benchmark task" in card
    assert "| arc_easy | acc_norm | 25 | 0.5000 ± 0.0103 | 0.6250 ± 0.0099 | 2376 |\n" in card
    assert "62 and 0 |\n\n## Limits" in card
    assert "benchmark" not in model_card(config, "run-1", train, {"accuracy": ESTIMATE})


TRAIN: dict[str, Any] = {"first_step_loss": 0.693147, "final": {"loss": 0.51234}}


def tree(**sections: Any) -> Config:
    given = {"run": {"name": "n", "output": "o"}, "model": {"path": "owner/base"}, "data": {"train": "t"}}
    return parse_config({**given, **sections})


def test_the_hub_reads_its_metadata_with_every_result_and_its_interval():
    data = {"train": ["hf://datasets/owner/pairs/train.parquet", "hf://datasets/owner/pairs@main/more", "local.jsonl"]}
    evaluation = {
        "accuracy": ESTIMATE,
        "win_rate": {"value": 0.6, "low": 0.55, "high": 0.65, "n": 200},
        "sets": {"bench": {"accuracy": {"value": 0.7, "low": 0.6, "high": 0.8, "n": 90}}, "none": {"accuracy": None}},
        "tasks": TASKS,
    }
    config = tree(data=data, evaluate={"win_rate": {}})
    read = ModelCard(model_card(config, "run-1", TRAIN, evaluation, licence="mit", num_pairs=24)).data
    assert (read.base_model, read.base_model_relation, read.datasets) == ("owner/base", "finetune", ["owner/pairs"])
    assert (read.license, read.library_name, read.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert read.model_name == "n" and read.tags == ["dpo-ray", "preference-alignment", "dpo"]
    found = {(one.dataset_name, one.metric_name): one for one in read.eval_results}
    accuracy = found["held-out preference pairs", "preference accuracy"]
    assert (accuracy.dataset_type, accuracy.metric_type, accuracy.metric_value) == ("owner/pairs", "accuracy", 0.75)
    assert accuracy.metric_args == {"low": 0.5091, "high": 0.8938, "level": 0.95, "n": 16}
    assert found["held-out preference pairs", "win rate against the base model"].metric_value == 0.6
    assert found["bench", "preference accuracy"].metric_args["n"] == 90
    assert found["arc_easy", "acc_norm"].metric_value == 0.625 and len(found) == 4


def test_what_is_not_of_the_hub_is_not_named_as_if_it_were(tmp_path: Path):
    assert hub_model("owner/base") == "owner/base" and hub_model("base") == "base"
    assert hub_model(str(tmp_path)) is None and hub_model("s3://b/m") is None and hub_model("package://p/m") is None
    read = ModelCard(model_card(tree(model={"path": str(tmp_path)}), "run-1", TRAIN, {})).data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets", "license", "model-index"} & read.keys()


def test_an_adapter_says_so_and_how_it_is_loaded():
    card = model_card(tree(model={"path": "owner/base", "lora": {"rank": 8}}), "run-1", TRAIN, {})
    read = ModelCard(card).data
    assert (read.library_name, read.base_model_relation) == ("peft", "adapter")
    assert "AutoPeftModelForCausalLM" in card and "| LoRA | rank 8," in card


def test_the_licence_is_that_of_the_base_models_own_card(tmp_path: Path):
    assert licence_of(tmp_path) is None
    for text, licence in (("---\nlicense: apache-2.0\n---\n# base", "apache-2.0"), ("# no metadata", None)):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) == licence
    for text in ("---\n[no, mapping]\n---\n", "---\nlicense: other: mine\n---\n", "---\n1: 2\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) is None
