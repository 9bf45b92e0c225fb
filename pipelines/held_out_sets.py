"""Named sets of held-out pairs, and on each the policy beside the model that is published now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ray.estimates import Estimate, bootstrap
from dpo_ray.evaluation.agreement import NONE, Noise, margin_noise
from dpo_ray.evaluation.held_out import HeldOut, held_out_pairs
from dpo_ray.evaluation.margins import preference_accuracy
from dpo_ray.on_ray.score import score_policy
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import compared_version, published_folder
from dpo_ray.training.files import MODEL_FOLDER
from pipelines.context import RunContext
from pipelines.deduplicate import deduplicate
from pipelines.ingest import ingest_set, of_set
from pipelines.reference import reference
from pipelines.tokenize import tokenize

HELD_OUT = "held_out"
"""What the run's own held-out pairs are called among the sets."""


@dataclass(frozen=True)
class ScoredSet:
    """A set, and what the models give to it."""

    rows: Artifact
    scores: Artifact
    published: Artifact | None
    """The scores of the model that is published now; None where there is none, or nothing asks for it."""
    version: str | None
    """Of that model."""
    calibration: Artifact | None = None
    """Of the engines that scored reference and policies; None where none was made."""

    def inputs(self, name: str) -> dict[str, str]:
        """What an evaluation of the set depends on."""
        found = {
            f"{name}/rows": self.rows,
            f"{name}/scores": self.scores,
            f"{name}/published": self.published,
            f"{name}/calibration": self.calibration,
        }
        return {key: artifact.fingerprint for key, artifact in found.items() if artifact is not None}


def score_sets(
    context: RunContext, policy: Artifact, rows: Artifact, scores: Artifact, calibration: Artifact | None
) -> dict[str, ScoredSet]:
    """The sets of evaluate.sets, and the run's own held-out pairs where the gate compares them.

    Args:
        rows, scores, calibration: of the run's own pairs, and what the policy gives to them.
    """
    gate, named = context.config.publish.gate.no_regression, context.config.evaluate.sets
    found = {}
    if HELD_OUT in gate:
        version, published = _published(context, policy, rows, context.config.train.eval_fraction)
        found[HELD_OUT] = ScoredSet(rows, scores, published, version, calibration)
    for name, paths in named.items():
        mine = context.other(of_set(context.config), f"set {name}")
        pairs = ingest_set(mine, f"evaluate.sets.{name}", paths)
        tokenized = tokenize(mine, pairs, deduplicate(mine, pairs))
        scored_rows, of_engines = reference(mine, tokenized)
        of_policy = score(mine, "score", policy.fingerprint, policy.location / MODEL_FOLDER, scored_rows, 1.0)
        version, published = _published(mine, policy, scored_rows, 1.0) if name in gate else (None, None)
        found[name] = ScoredSet(scored_rows, of_policy, published, version, of_engines)
    return found


def noise_of(found: HeldOut, calibration: Artifact | None, *, per_token: bool) -> Noise:
    """What the engines alone make of the margins. per_token: as of margin_noise."""
    if calibration is None or not len(found.margins):
        return NONE
    num_tokens = float(np.mean(found.chosen_tokens - found.rejected_tokens))
    return margin_noise(calibration.manifest.metrics, num_tokens, per_token=per_token)


def measure_sets(sets: dict[str, ScoredSet], *, per_token: bool = False) -> dict[str, Any]:
    """Set → its `accuracy`; and, where there is a published model to compare with, that model's `version`, its
    accuracy as `published`, and the `change` from it to the policy's on the same pairs. Where that model is the
    reference itself, its accuracy is undefined, and so is the change.

    Args:
        per_token: margins are between means over tokens instead of sums.
    """
    measured = {}
    for name, one in sets.items():
        found = held_out_pairs(one.scores)
        noise = noise_of(found, one.calibration, per_token=per_token)
        margins = found.margins
        accuracy = preference_accuracy(margins, noise)
        measured[name] = {"accuracy": accuracy and accuracy.as_dict(), "version": one.version, "published": None}
        if one.published is None or accuracy is None:
            continue
        before = held_out_pairs(one.published).margins
        of_published = preference_accuracy(before, noise)
        if of_published is None:  # its margins are 0: it is the reference, and what it prefers is not told by them
            continue
        measured[name]["published"] = of_published.as_dict()
        measured[name]["change"] = _mean_change((margins > 0).astype(float) - (before > 0)).as_dict()
    return measured


def _mean_change(changes: np.ndarray) -> Estimate:
    """Of -1, 0 and 1. One more of either end is reckoned with, so that pairs that agree are not taken for certain."""
    more = np.concatenate([changes, [-1.0, 1.0]])
    spread = bootstrap(lambda of: float(more[of].mean()), len(more))
    return Estimate(float(changes.mean()), spread.low, spread.high, len(changes))


def _published(
    context: RunContext, policy: Artifact, rows: Artifact, eval_fraction: float
) -> tuple[str | None, Artifact | None]:
    """The version that the policy is compared with, and its scores of these rows."""
    folder = published_folder(context.output, context.config.run.name)
    version = compared_version(folder, policy.fingerprint)
    if version is None:
        return None, None
    return version, score(context, "score_published", version, folder / version, rows, eval_fraction)


def score(
    context: RunContext, stage: str, policy: str, folder: Location, rows: Artifact, eval_fraction: float
) -> Artifact:
    """What a policy gives to held-out pairs. policy, folder, eval_fraction: as of score_policy."""
    return context.stage(
        stage, lambda: score_policy(context.output, context.config, policy, folder, rows, eval_fraction)
    )
