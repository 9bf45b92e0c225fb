"""The published model's card, by the conventions of the Hugging Face Hub: metadata that it reads, a page for people.

https://huggingface.co/docs/hub/model-cards; what the metadata may hold is checked by huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from dpo_ray.config import Config, Paths
from dpo_ray.evaluation.render import judged_by, named_estimates, render
from dpo_ray.storage.hub import HubPath, is_hub_place

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_MEASURES = {
    "accuracy": "accuracy",
    "win_rate": "win_rate",
    "greedy_win_rate": "win_rate",
    "length_controlled_win_rate": "win_rate",
    "kl_per_token": "kl_divergence",
}
"""Of an evaluation → the hub's type of the metric, or our own where it has none."""
_HELD_OUT = "held-out preference pairs"


def model_card(
    config: Config,
    run_id: str,
    train: dict[str, Any],
    evaluation: dict[str, Any],
    started_from: str | None = None,
    *,
    licence: str | None = None,
    num_pairs: int | None = None,
) -> str:
    """The README.md of a published model.

    Args:
        train, evaluation: metrics of the two artifacts.
        started_from: the path of the model that training began with, if another.
        licence: of the base model, as its own card names it; None: not known.
        num_pairs: that were trained on.
    """
    from huggingface_hub import ModelCard, ModelCardData

    is_adapter = _is_adapter(config)
    base = hub_model(config.model.path)
    datasets = hub_datasets(config)
    found = list(_results(config, evaluation, datasets))
    data = ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if is_adapter else "finetune") if base is not None else None,
        datasets=datasets or None,
        eval_results=found or None,
        library_name="peft" if is_adapter else "transformers",
        license=licence,
        model_name=config.run.name,
        pipeline_tag="text-generation",
        tags=[
            "dpo-ray",
            "preference-alignment",
            "dpo" if config.train.loss.type == "sigmoid" else config.train.loss.type,
        ],
    )
    body = render(
        "model_card.md",
        config=config,
        run_id=run_id,
        base=config.model.path,
        started_from=started_from or config.model.path,
        train=train,
        estimates=named_estimates(evaluation),
        sets=_sets(evaluation),
        tasks=evaluation.get("tasks"),
        judges=judged_by(config) if evaluation.get("win_rate") else None,
        datasets=datasets,
        num_pairs=num_pairs,
        licence=licence,
        is_adapter=is_adapter,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def licence_of(folder: Path) -> str | None:
    """What the card in a model's folder names as its licence; None where it names none, or there is no card."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    except (ValueError, TypeError, yaml.YAMLError):  # somebody else's card, whose metadata are none
        return None
    return found if isinstance(found, str) else None


def hub_model(path: str) -> str | None:
    """The model's name on the hub; None where it is of no hub."""
    return path if _REPOSITORY.fullmatch(path) and not Path(path).exists() else None


def hub_datasets(config: Config) -> list[str]:
    """Those of the hub that were trained on, each once."""
    data = config.data
    given = [source.path for source in data.sources] if data.sources else [cast("Paths", data.train or ())]
    places = [place for paths in given for place in ([paths] if isinstance(paths, str) else paths)]
    return list(dict.fromkeys(HubPath.of(place).repository for place in places if is_hub_place(place)))


def _is_adapter(config: Config) -> bool:
    return config.model.lora is not None and config.model.lora.export == "adapter"


def _sets(evaluation: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    sets = evaluation.get("sets") or {}
    return [(name, one["accuracy"]) for name, one in sets.items() if one.get("accuracy")]


def _results(config: Config, evaluation: dict[str, Any], datasets: list[str]) -> Iterator[EvalResult]:
    """Each with its 95% interval as arguments of the metric, for the hub has no place of its own for that."""
    from huggingface_hub import EvalResult

    def of_estimate(name: str, kind: str, label: str, found: dict[str, Any], dataset: str) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=name,
            metric_type=kind,
            metric_name=label,
            metric_value=round(found["value"], 6),
            metric_args={
                "low": round(found["low"], 6),
                "high": round(found["high"], 6),
                "level": 0.95,
                "n": found["n"],
            },
        )

    held_out = datasets[0] if datasets else "preference-pairs"
    labels = dict(zip([name for name in _MEASURES if evaluation.get(name)], named_estimates(evaluation), strict=True))
    for name, (label, found) in labels.items():
        yield of_estimate(_HELD_OUT, _MEASURES[name], label, found, held_out)
    for name, found in _sets(evaluation):
        yield of_estimate(name, "accuracy", "preference accuracy", found, "preference-pairs")
    for task in evaluation.get("tasks") or ():
        if task["tuned"]["value"] is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type=task["task"],
                dataset_name=task["task"],
                metric_type=task["metric"],
                metric_name=task["metric"],
                metric_value=round(task["tuned"]["value"], 6),
                metric_args={"stderr": task["tuned"]["stderr"], "num_fewshot": task["num_fewshot"]},
            )
