"""Base and tuned model on benchmark tasks."""

from __future__ import annotations

from functools import partial

from dpo_ray.config import Tasks
from dpo_ray.on_ray.tasks import measure_tasks
from dpo_ray.storage.artifact import Artifact
from dpo_ray.training.files import MODEL_FOLDER
from pipelines.context import RunContext


def measure_both(context: RunContext, options: Tasks, policy: Artifact) -> dict[str, Artifact]:
    """Base and tuned → what each measures; the base model's is shared by all runs and trials in the output folder."""
    base = context.config.model
    folder = (policy.location / MODEL_FOLDER).uri
    tuned = base.model_copy(update={"path": folder, "revision": None, "lora": None})
    return {
        side: context.stage(f"tasks_{side}", partial(measure_tasks, context.output, context.config, model, options))
        for side, model in (("base", base), ("tuned", tuned))
    }
