"""Tokenized pairs → the same with reference log-probs, calibrated against the trainer's forward."""

from __future__ import annotations

from dpo_ray.artifacts import Artifact, load
from dpo_ray.config import Config
from dpo_ray.errors import DataError, ReferenceMismatch
from dpo_ray.model import load_tokenizer, resolve, weights_hash
from dpo_ray.on_ray.scoring import calibrate, score_reference
from dpo_ray.storage import Location
from dpo_ray.tokenization import tokenizer_identity
from pipelines.context import RunContext


def reference(context: RunContext, tokenized: Artifact) -> tuple[Artifact, Artifact]:
    """Reference scores that the trainer's own forward reproduces, and their calibration. Raises ReferenceMismatch."""
    scored = context.stage("reference", lambda: score_reference(context.output, context.config, tokenized))
    return scored, check_calibration(context, scored)


def given_reference(context: RunContext, path: str) -> Artifact:
    """A finished reference artifact made elsewhere, if it was made for this configuration's model.

    Raises DataError where it is not finished, ReferenceMismatch where it is of another model, tokenizer or dtype.
    """
    location = Location.of(path)
    artifact = load(location, "reference", location.name)
    if artifact is None:
        raise DataError(f"{location} is not a finished reference artifact: there is no manifest.json in it.")
    require_same_model(artifact, context.config)
    check_calibration(context, artifact)
    return artifact


def require_same_model(artifact: Artifact, config: Config) -> None:
    """Raises ReferenceMismatch, naming what differs."""
    model = config.model
    folder = resolve(model.path, model.revision)
    mine = {
        "tokenizer": tokenizer_identity(load_tokenizer(folder, trust_remote_code=model.trust_remote_code)),
        "weights": weights_hash(folder),
        "dtype": model.dtype,
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
    context.results["reference"] = {"calibration": checked.manifest.metrics}
    return checked
