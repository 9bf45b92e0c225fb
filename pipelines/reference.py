"""Tokenized pairs → the same with reference log-probs, calibrated against the trainer's forward."""

from __future__ import annotations

from dpo_ray.artifacts import Artifact
from dpo_ray.on_ray.scoring import calibrate, score_reference
from pipelines.context import RunContext


def reference(context: RunContext, tokenized: Artifact) -> Artifact:
    """Reference scores that the trainer's own forward reproduces. Raises ReferenceMismatch."""
    scored = context.stage("reference", lambda: score_reference(context.output, context.config, tokenized))
    checked = context.stage("calibrate", lambda: calibrate(context.output, context.config, scored))
    context.results["reference"] = {"calibration": checked.manifest.metrics}
    return scored
