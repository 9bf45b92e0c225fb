"""The model stages over tokenized pairs: reference scores, of mismatched completions too, and a policy's scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dpo_ray.config import VLLM, Config, Model
from dpo_ray.evaluation.held_out import HeldOutRows
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.model.version import own_forward
from dpo_ray.on_ray.calibrate import choose_engine, max_pair_tokens
from dpo_ray.on_ray.pool import shard_stage, shard_tasks, torch_pool
from dpo_ray.on_ray.shard_worker import ShardFunction
from dpo_ray.on_ray.vllm_engine import VLLMScorer, vllm_pool
from dpo_ray.on_ray.vllm_version import require_vllm
from dpo_ray.progress import say
from dpo_ray.shards.score import (
    REFERENCE_COLUMNS,
    Engine,
    MismatchShard,
    PolicyScoreShard,
    ScoreShard,
    TorchMismatchShard,
    TorchScoreShard,
    identity,
    policy_identity,
)
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from dpo_ray.training.index import num_judging


def score_reference(output: Location, config: Config, tokenized: Artifact) -> tuple[Artifact, bool]:
    """Reference log-probs of every tokenized pair."""
    engine = choose_engine(output, config, tokenized)
    return _score(output, config, "reference", tokenized, engine, vllm_score_shard, TorchScoreShard)


def score_mismatched(output: Location, config: Config, scored: Artifact) -> tuple[Artifact, bool]:
    """The rows of a reference artifact, each with a mismatched completion and its reference log-probs.

    A stage of its own, so that the reference artifact stays the one that every other loss shares.
    """
    engine = config.reference.engine
    if engine == "auto":
        engine = scored.manifest.identity["engine"]
    return _score(output, config, "mismatched", scored, engine, vllm_mismatch_shard, TorchMismatchShard)


def _score(
    output: Location,
    config: Config,
    kind: str,
    rows: Artifact,
    engine: Engine,
    vllm_work: Callable[..., ShardFunction],
    torch_work: Callable[..., ShardFunction],
) -> tuple[Artifact, bool]:
    """A stage in which the model of the configuration, as an engine runs it, scores the rows of an artifact."""
    model = config.model
    if engine == "vllm":
        engine_version = require_vllm("reference.engine=vllm")
        arguments = {"model": model, "options": config.vllm, "max_model_len": max_pair_tokens(config)}
        pool = vllm_pool(config, vllm_work, arguments)
    else:
        engine_version = own_forward()
        pool = torch_pool(config, torch_work, {"model": model})
    return shard_stage(
        output,
        kind,
        identity=identity(
            ModelFolder.of(model).weights_hash(),
            rows.manifest.identity["tokenizer"],
            model.dtype,
            engine,
            engine_version,
            model.quantization,
        ),
        inputs={rows.manifest.kind: rows.fingerprint},
        tasks=shard_tasks(rows),
        pool=replace(pool, isolates=True),
        unit="pairs",
    )


def score_policy(
    output: Location, config: Config, policy: str, folder: Location, rows: Artifact, eval_fraction: float
) -> tuple[Artifact, bool]:
    """What a trained policy gives to held-out pairs of a tokenized, reference or mismatched artifact.

    Of many pairs evaluate.max_pairs are drawn.

    Args:
        policy: fingerprint of its artifact, which is also its version where it was published.
        folder: where its model lies, in either place.
        eval_fraction: of the prompts, those that training was steered by: they do not count.
    """
    loss = config.train.loss
    there = num_judging(output, rows, eval_fraction)
    drawn = HeldOutRows.at_most(config.evaluate.max_pairs, there, eval_fraction)
    if drawn.share < 1:
        say("score", f"of {there} held-out pairs about {config.evaluate.max_pairs} are drawn (evaluate.max_pairs)")
    model = Model(path=folder.uri, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code)
    return shard_stage(
        output,
        "policy_scores",
        identity=policy_identity(policy, model.dtype, loss, drawn),
        inputs={"policy": policy, rows.manifest.kind: rows.fingerprint},
        tasks=shard_tasks(rows),
        pool=torch_pool(config, PolicyScoreShard, {"model": model, "loss": loss, "rows": drawn}),
        unit="pairs",
    )


def vllm_score_shard(model: Model, options: VLLM, max_model_len: int) -> ScoreShard:
    """The worker of the reference stage with vLLM."""
    return ScoreShard(VLLMScorer(model, options, max_model_len), REFERENCE_COLUMNS)


def vllm_mismatch_shard(model: Model, options: VLLM, max_model_len: int) -> MismatchShard:
    """The worker of the mismatched stage with vLLM."""
    return MismatchShard(VLLMScorer(model, options, max_model_len))
