"""Tokenized pairs → the rows that are trained on: with what the loss needs of the reference, calibrated against the
trainer's forward."""

from __future__ import annotations

from dpo_ray.config import Config
from dpo_ray.data.tally import Tally
from dpo_ray.errors import DataError, ReferenceMismatch
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.calibrate import calibrate
from dpo_ray.on_ray.score import score_mismatched, score_reference
from dpo_ray.on_ray.session import expect_training
from dpo_ray.shards.isolation import FAILURES
from dpo_ray.storage.artifact import Artifact, load
from dpo_ray.storage.location import Location
from pipelines.context import RunContext


def reference(context: RunContext, tokenized: Artifact) -> tuple[Artifact, Artifact | None]:
    """The rows to train and to evaluate on, and the calibration of their reference scores.

    Raises ReferenceMismatch, before anything is scored where the engine shows there already that it does not compute
    the trainer's model; and DataError where too many rows could not be scored.

    They are the rows with reference scores that the trainer's own forward reproduces, with mismatched completions
    too for a loss that uses them. A loss without a reference takes the tokenized rows as they are: nothing is scored,
    and the calibration is None.
    """
    if not context.config.train.loss.needs_reference:
        return tokenized, None
    scored = context.stage("reference", lambda: score_reference(context.output, context.config, tokenized))
    require_enough_scored(scored, context.config.data.max_quarantined_fraction)
    calibration = check_calibration(context, scored)
    return with_mismatched(context, scored), calibration


def with_mismatched(context: RunContext, scored: Artifact) -> Artifact:
    """The reference artifact with mismatched completions, if the loss uses them; otherwise as it is."""
    if not context.config.train.loss.needs_mismatched:
        return scored
    rows = context.stage("mismatched", lambda: score_mismatched(context.output, context.config, scored))
    require_enough_scored(rows, context.config.data.max_quarantined_fraction)
    return rows


def require_enough_scored(scored: Artifact, max_quarantined_fraction: float) -> None:
    """Raises DataError where the engine could not score too large a share of the rows."""
    tally = Tally.of(scored.manifest.counters)
    reasons = tally.dropped_for(FAILURES)
    lost, read = sum(reasons.values()), tally.read
    if lost > max_quarantined_fraction * read:
        named = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        raise DataError(
            f"The engine could not score {lost} of {read} rows ({named}), a share of {lost / read:.1%}, more than "
            f"data.max_quarantined_fraction={max_quarantined_fraction:g} allows. The rows, with what the engine said, "
            f"are {scored.where_quarantined()}. Mend their cause and remove {scored.location} to have them scored "
            "again; or raise the limit, if these rows may be left out."
        )


def given_reference(context: RunContext, path: str) -> Artifact:
    """The rows to train on, of a finished reference artifact made elsewhere for this configuration's model.

    Raises DataError where it is not finished, ReferenceMismatch where it is of another model, tokenizer or dtype.
    """
    expect_training()
    location = Location.of(path)
    artifact = load(location, "reference", location.name)
    if artifact is None:
        raise DataError(
            f"{location} is not a finished reference artifact, for there is no manifest.json in it. Name one below "
            "artifacts/reference of an output folder, or leave --reference out to have it computed."
        )
    require_same_model(artifact, context.config)
    check_calibration(context, artifact)
    return with_mismatched(context, artifact)


def require_same_model(artifact: Artifact, config: Config) -> None:
    """Raises ReferenceMismatch, naming what differs."""
    model = config.model
    folder = ModelFolder.of(model)
    mine = {
        "tokenizer": folder.tokenizer_hash(),
        "weights": folder.weights_hash(),
        "dtype": model.dtype,
        "quantization": model.quantization,
    }
    for name, value in mine.items():
        found = artifact.manifest.identity.get(name)
        if found != value:
            raise ReferenceMismatch(
                f"The {name} of model.path={model.path} ({value}) is not the one that the reference artifact "
                f"{artifact.location} was made with ({found}): its token ids or log-probs would be wrong for this "
                "model. Name the model that it was made with, or leave --reference out to have the reference computed."
            )


def check_calibration(context: RunContext, scored: Artifact) -> Artifact:
    """The calibration gate, recorded in the summary. Raises ReferenceMismatch."""
    checked = context.stage("calibrate", lambda: calibrate(context.output, context.config, scored))
    context.results["reference"] = {
        "engine": scored.manifest.identity["engine"],
        "calibration": checked.manifest.metrics,
    }
    return checked
