"""The main job, top to bottom."""

from __future__ import annotations

import json

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


def align(context: RunContext, until: Stage = "publish") -> None:
    """All stages up to the named one; what is finished is taken over."""
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
    pairs, left_out = preferences(context)
    tokenized = tokenize(context, pairs, left_out)
    report_data(context, pairs, left_out, tokenized)
    rows, calibration = reference(context, tokenized)
    if calibration is not None:
        report_data(context, pairs, left_out, tokenized, rows)
    return rows, calibration


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


def write_report(context: RunContext, summary: dict) -> None:
    """report.html of the run."""
    metrics = context.folder / "metrics.jsonl"
    history = [json.loads(line) for line in metrics.read_bytes().splitlines()] if metrics.exists() else []
    (context.folder / "report.html").write_bytes(html_report(context.config, summary, history).encode())
