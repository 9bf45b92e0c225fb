"""The published model's card."""

from __future__ import annotations

from typing import Any

from dpo_ray.config import Config
from dpo_ray.evaluation.render import named_estimates, render


def model_card(
    config: Config, run_id: str, train: dict[str, Any], evaluation: dict[str, Any], started_from: str | None = None
) -> str:
    """The README.md of a published model. started_from: the path of the model that training began with, if another."""
    return render(
        "model_card.md",
        config=config,
        run_id=run_id,
        started_from=started_from or config.model.path,
        train=train,
        estimates=named_estimates(evaluation),
        tasks=evaluation.get("tasks"),
    )
