"""Rows of pairs → trained policy."""

from __future__ import annotations

from typing import Any

from dpo_ray.config import Model
from dpo_ray.on_ray.trainer import Steering, train_policy
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact
from dpo_ray.training.files import HISTORY, KIND
from pipelines.context import RunContext
from pipelines.live import TRAINING
from pipelines.start import starting_model


def train(context: RunContext, rows: Artifact, start: Model | None = None) -> Artifact:
    """Train, or go on with a training that was interrupted.

    Args:
        start: what the policy starts from; None: what train.start says.

    Raises ConfigError where train.start names a model that cannot be started from.
    """
    if start is None:
        start = starting_model(context.config, context.output)
        if context.config.train.start == "published":
            none_yet = ", for nothing is published under this name yet" if start == context.config.model else ""
            say(KIND, f"train.start=published: training starts from {start.path}{none_yet}")
    config = context.config.model_copy(update={"model": start})
    steering = Steering(told_to=context.folder / TRAINING)
    policy = context.stage("train", lambda: train_policy(context.output, config, rows, steering, run_id=context.run_id))
    context.models[policy.fingerprint] = start
    metrics: dict[str, Any] = policy.manifest.metrics
    context.results["train"] = metrics | {"started_from": start.path}
    policy.file(HISTORY).copy_to(context.folder / "metrics.jsonl")
    return policy
