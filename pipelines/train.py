"""Rows of pairs → trained policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpo_ray.config import Model
from dpo_ray.on_ray.trainer import Steering, train_location, train_policy
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from dpo_ray.tracking.fan import flat
from dpo_ray.tracking.steps import told_steps
from dpo_ray.tracking.tracker import Opening
from dpo_ray.training.files import HISTORY, KIND
from pipelines.context import RunContext
from pipelines.live import TRAINING
from pipelines.start import starting_model
from pipelines.tracking import followed, tell_history


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
    whose = context.variant
    if context.trackers is not None:
        name = f"{context.run_id}, {whose}" if whose else context.run_id
        context.trackers.open(Opening(whose, name, flat(config.model_dump(mode="json"))))
    training, metrics_file = train_location(context.output, config, rows), context.folder / HISTORY
    with followed(context.trackers, whose, training), _metrics_kept(training, metrics_file):
        policy = context.stage(
            "train", lambda: train_policy(context.output, config, rows, steering, run_id=context.run_id)
        )
    tell_history(context.trackers, whose, policy)
    if context.trackers is not None and whose:
        context.trackers.end(whose, "finished")
    context.models[policy.fingerprint] = start
    metrics: dict[str, Any] = policy.manifest.metrics
    context.results["train"] = metrics | {"started_from": start.path}
    policy.file(HISTORY).copy_to(metrics_file)
    return policy


@contextmanager
def _metrics_kept(training: Location, file: Location) -> Iterator[None]:
    """If the training within does not come to its end, what it told of until then is kept: the report shows it."""
    try:
        yield
    except BaseException:
        try:
            told = told_steps(training)
            if told:
                file.write_bytes("".join(f"{json.dumps(metrics)}\n" for metrics in told).encode())
        except (OSError, ValueError) as error:  # why the training ended comes first
            say(KIND, f"the metrics up to where it ended could not be kept: {error}")
        raise
