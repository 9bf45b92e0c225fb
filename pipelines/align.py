"""The main job, top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dpo_ray.config import Model
from dpo_ray.on_ray.session import expect_training
from dpo_ray.storage.artifact import Artifact
from pipelines import STAGES, Stage
from pipelines.context import RunContext
from pipelines.data_report import report_data
from pipelines.deduplicate import deduplicate
from pipelines.evaluate import evaluate
from pipelines.generate import generate
from pipelines.ingest import ingest
from pipelines.publish import publish
from pipelines.reference import reference
from pipelines.tokenize import tokenize
from pipelines.tracking import tell_evaluation
from pipelines.train import train


@dataclass(frozen=True)
class Prepared:
    """What the stages before training have made, which every trial of a sweep shares."""

    pairs: Artifact
    rows: Artifact
    """What is trained on: with what the loss needs of the reference, or the tokenized pairs for a loss without."""
    calibration: Artifact | None
    """Of the rows' reference scores; None for a loss without."""


def align(context: RunContext, until: Stage = "publish") -> None:
    """All stages up to the named one; what is finished is taken over."""
    if STAGES.index(until) >= STAGES.index("train"):
        expect_training()
    if until in {"ingest", "generate"}:
        preferences(context)
        return
    if until == "tokenize":
        tokenized_preferences(context)
        return
    if until == "reference":
        prepare_reference(context)
        return
    policy, measure = train_and_measure(context)
    if until == "train":
        return
    evaluation = measure()
    tell_evaluation(context, policy, evaluation.manifest.metrics)
    if until == "publish":
        publish(context, policy, evaluation, measure)


def train_and_measure(context: RunContext, start: Model | None = None) -> tuple[Artifact, Callable[[], Artifact]]:
    """The stages up to train: the policy, and what makes its evaluation, each time it is called.

    start: as of pipelines.train.
    """
    prepared = prepare_reference(context)
    policy = train(context, prepared.rows, start)
    return policy, partial(evaluate, context, prepared.pairs, prepared.rows, prepared.calibration, policy)


def preferences(context: RunContext) -> tuple[Artifact, Artifact]:
    """The pairs, generated or read, and which of them are left out as duplicates and the like."""
    pairs = generate(context) if context.config.generate is not None else ingest(context)
    return pairs, deduplicate(context, pairs)


def tokenized_preferences(context: RunContext) -> tuple[Artifact, Artifact, Artifact]:
    """The stages up to tokenize, and the report on them: the pairs, which are left out, and their token ids."""
    pairs, left_out = preferences(context)
    tokenized = tokenize(context, pairs, left_out)
    report_data(context, pairs, left_out, tokenized)
    return pairs, left_out, tokenized


def prepare_reference(context: RunContext) -> Prepared:
    """The stages up to reference, and the report on them."""
    return with_reference(context, *tokenized_preferences(context))


def with_reference(context: RunContext, pairs: Artifact, left_out: Artifact, tokenized: Artifact) -> Prepared:
    """The stage reference of what tokenized_preferences made, and the report on it."""
    rows, calibration = reference(context, tokenized)
    if calibration is not None:
        report_data(context, pairs, left_out, tokenized, rows)
    return Prepared(pairs, rows, calibration)
