"""Rows of pairs → trained policy."""

from __future__ import annotations

from typing import Any

from dpo_ray.on_ray.trainer import train_policy
from dpo_ray.storage.artifact import Artifact
from dpo_ray.training.files import HISTORY
from pipelines.context import RunContext


def train(context: RunContext, rows: Artifact) -> Artifact:
    """Train, or go on with a training that was interrupted."""
    policy = context.stage("train", lambda: train_policy(context.output, context.config, rows, run_id=context.run_id))
    context.models[policy.fingerprint] = context.config.model
    metrics: dict[str, Any] = policy.manifest.metrics
    context.results["train"] = metrics
    policy.file(HISTORY).copy_to(context.folder / "metrics.jsonl")
    return policy
