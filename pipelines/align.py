"""The main job, top to bottom."""

from __future__ import annotations

import json

from dpo_ray.evaluation.report import html_report
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
from pipelines.train import train


def align(context: RunContext, until: Stage = "publish") -> None:
    """All stages up to the named one; what is finished is taken over."""
    if STAGES.index(until) >= STAGES.index("train"):
        expect_training()
    pairs, left_out = preferences(context)
    if until in {"ingest", "generate"}:
        return
    tokenized = tokenize(context, pairs, left_out)
    report_data(context, pairs, left_out, tokenized)
    if until == "tokenize":
        return
    rows, calibration = reference(context, tokenized)
    if calibration is not None:
        report_data(context, pairs, left_out, tokenized, rows)
    if until == "reference":
        return
    policy = train(context, rows)
    if until == "train":
        return
    evaluation = evaluate(context, pairs, rows, calibration, policy)
    if until == "publish":
        publish(context, policy, evaluation)


def preferences(context: RunContext) -> tuple[Artifact, Artifact | None]:
    """The pairs, generated or read, and of those that were read which are left out as duplicates and the like."""
    if context.config.generate is not None:
        return generate(context), None
    pairs = ingest(context)
    return pairs, deduplicate(context, pairs)


def prepare_reference(context: RunContext) -> tuple[Artifact, Artifact | None]:
    """The stages before training, which every trial of a sweep shares: the rows to train on, and their calibration.

    Without a reference in the loss these are the tokenized pairs and None.
    """
    expect_training()
    pairs, left_out = preferences(context)
    tokenized = tokenize(context, pairs, left_out)
    report_data(context, pairs, left_out, tokenized)
    rows, calibration = reference(context, tokenized)
    if calibration is not None:
        report_data(context, pairs, left_out, tokenized, rows)
    return rows, calibration


def write_report(context: RunContext, summary: dict) -> None:
    """report.html of the run."""
    metrics = context.folder / "metrics.jsonl"
    history = [json.loads(line) for line in metrics.read_bytes().splitlines()] if metrics.exists() else []
    (context.folder / "report.html").write_bytes(html_report(context.config, summary, history).encode())
