"""The main job, top to bottom."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dpo_ray.config import Config
from dpo_ray.data.chat import require_chat_template, require_prompt_room
from dpo_ray.errors import ConfigError
from dpo_ray.evaluation.report import html_report
from dpo_ray.model.folders import load_tokenizer
from dpo_ray.model.resolve import resolve
from dpo_ray.on_ray.vllm_engine import require_vllm
from dpo_ray.reward_source import reward_identity
from dpo_ray.storage.artifact import Artifact
from pipelines import STAGES, Stage
from pipelines.context import RunContext
from pipelines.data_report import report_data
from pipelines.deduplicate import deduplicate
from pipelines.evaluate import evaluate
from pipelines.generate import generate
from pipelines.ingest import check_inputs, ingest
from pipelines.publish import publish
from pipelines.reference import reference, require_reference_use
from pipelines.tokenize import tokenize
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
    if until in {"ingest", "generate"}:
        preferences(context)
        return
    if until == "tokenize":
        tokenized_preferences(context)
        return
    prepared = prepare_reference(context)
    if until == "reference":
        return
    policy = train(context, prepared.rows)
    if until == "train":
        return
    evaluation = evaluate(context, prepared.pairs, prepared.rows, prepared.calibration, policy)
    if until == "publish":
        publish(context, policy, evaluation)


def preferences(context: RunContext) -> tuple[Artifact, Artifact | None]:
    """The pairs, generated or read, and of those that were read which are left out as duplicates and the like."""
    if context.config.generate is not None:
        return generate(context), None
    pairs = ingest(context)
    return pairs, deduplicate(context, pairs)


def tokenized_preferences(context: RunContext) -> tuple[Artifact, Artifact | None, Artifact]:
    """The stages up to tokenize, and the report on them: the pairs, which are left out, and their token ids."""
    pairs, left_out = preferences(context)
    tokenized = tokenize(context, pairs, left_out)
    report_data(context, pairs, left_out, tokenized)
    return pairs, left_out, tokenized


def prepare_reference(context: RunContext) -> Prepared:
    """The stages up to reference, and the report on them."""
    pairs, left_out, tokenized = tokenized_preferences(context)
    rows, calibration = reference(context, tokenized)
    if calibration is not None:
        report_data(context, pairs, left_out, tokenized, rows)
    return Prepared(pairs, rows, calibration)


def preflight(config: Config, until: Stage = "publish") -> None:
    """Everything that can be known to be wrong before long work begins. Raises ConfigError or DataError."""
    if until == "ingest" and config.generate is not None:
        raise ConfigError(
            "This configuration makes its pairs with `generate`: run `dpo-ray generate` instead of ingest."
        )
    if until == "generate" and config.generate is None:
        raise ConfigError(
            "This configuration reads its pairs from data.train: run `dpo-ray ingest` instead of generate."
        )
    if config.data.train is not None:
        check_inputs(config)
    if config.generate is not None:
        require_vllm("generate")
        reward_identity(config.generate.reward)
    if until == "reference":
        require_reference_use(config)
    scores_reference = config.train.loss.needs_reference and STAGES.index(until) >= STAGES.index("reference")
    if config.reference.engine == "vllm" and scores_reference:
        require_vllm("reference.engine=vllm")
    if config.evaluate.win_rate is not None and STAGES.index(until) >= STAGES.index("evaluate"):
        require_vllm("evaluate.win_rate")
        reward_identity(config.evaluate.win_rate.reward)
    if until != "ingest":
        folder = resolve(config.model.path, config.model.revision)
        tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
        require_chat_template(tokenizer, config.model.path)
        require_prompt_room(tokenizer, config.data)


def write_report(context: RunContext, summary: dict[str, Any]) -> None:
    """report.html of the run."""
    metrics = context.folder / "metrics.jsonl"
    history = [json.loads(line) for line in metrics.read_bytes().splitlines()] if metrics.exists() else []
    (context.folder / "report.html").write_bytes(html_report(context.config, summary, history).encode())
