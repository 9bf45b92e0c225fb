"""Who computes a reward model: vLLM's pooling runner, or transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from dpo_ray.config import VLLM, Config, RewardModel
from dpo_ray.on_ray.engine_choice import Choice, Undecided, alone, choose, tried
from dpo_ray.on_ray.failures import raise_ours
from dpo_ray.on_ray.pool import Pool, torch_pool
from dpo_ray.on_ray.vllm_engine import VLLMClassifier, vllm_pool
from dpo_ray.on_ray.vllm_version import require_vllm
from dpo_ray.progress import say
from dpo_ray.scoring.models import model_of
from dpo_ray.scoring.reward_model import RewardModelScorer
from dpo_ray.scoring.scorer import Row
from dpo_ray.shards.reward import RewardModelShard, RewardShard, reward_model_identity
from dpo_ray.shards.score import Engine
from dpo_ray.storage.artifact import Artifact, library_versions, read_shard
from dpo_ray.storage.location import Location

_ROWS = 16
"""Prompts whose completions are scored by both where `engine` is auto."""
_TOLERANCE = 0.1
"""How far the two may be apart, in standard deviations of the scores."""


def reward_model_work(
    output: Location, config: Config, source: RewardModel, candidates: Artifact
) -> tuple[dict[str, Any], Pool]:
    """What changes a reward model's scores beside the candidates, and who computes them."""
    engine = _engine(output, config, source, candidates)
    if engine == "vllm":
        version = f"vllm {require_vllm(f'The reward {source.label} with engine=vllm')}"
        pool = vllm_pool(config, vllm_reward_model_shard, {"source": source, "options": config.vllm})
    else:
        version, pool = _torch_version(), torch_pool(config, RewardModelShard, {"source": source})
    return reward_model_identity(source, version), pool


def vllm_reward_model_shard(source: RewardModel, options: VLLM) -> RewardShard:
    """The worker of a reward model that vLLM serves."""
    return RewardShard(_by_vllm(source, options))


def _engine(output: Location, config: Config, source: RewardModel, candidates: Artifact) -> Engine:
    """source.engine; for auto, on GPUs, vLLM where it agrees with transformers on the first of these candidates."""
    if source.engine != "auto":
        return source.engine
    if config.vllm.gpus_per_actor == 0:
        return "torch"
    identity = reward_model_identity(source, _torch_version())
    return choose(
        output,
        "reward_engine",
        "reward",
        f"{source.label}: engine",
        identity,
        lambda: _compare_engines(config, source, candidates),
        _judge,
    )


def _torch_version() -> str:
    versions = library_versions()
    return f"torch {versions['torch']}, transformers {versions['transformers']}"


def _compare_engines(config: Config, source: RewardModel, candidates: Artifact) -> dict[str, Any]:
    rows = [_asked(row) for row in islice(_rows(candidates), _ROWS)]
    if not any(row["completions"] for row in rows):
        raise Undecided("there is no completion to compare the two on")
    say("reward", f"{source.label}: scoring the completions of {len(rows)} prompts with vLLM and with transformers")
    given: dict[str, Any] = {"source": source, "rows": rows}
    by_vllm = tried(vllm_pool(config, _score_by_vllm, {**given, "options": config.vllm}), "serve this reward model")
    try:
        by_torch = alone(torch_pool(config, _score_by_torch, given))
    except Exception as error:
        raise_ours(error, "reward")
    return agreement(by_vllm, by_torch)


def agreement(by_vllm: list[float], by_torch: list[float]) -> dict[str, Any]:
    """How far these scores of the same completions are apart; None where some are not finite."""
    spread, worst = float(np.std(by_torch)), float(np.max(np.abs(np.subtract(by_vllm, by_torch))))
    return {
        "completions": len(by_torch),
        "largest_difference": worst if math.isfinite(worst) else None,
        "standard_deviation": spread if math.isfinite(spread) else None,
    }


def _judge(measured: dict[str, Any]) -> Choice:
    worst, spread = measured["largest_difference"], measured["standard_deviation"]
    if worst is None or spread is None:
        return Choice("torch", "vLLM gives scores that are not finite")
    why = (
        f"on {measured['completions']} completions vLLM and transformers differ by up to {worst:.1e}, and the scores' "
        f"standard deviation is {spread:.1e} (the limit is {_TOLERANCE:g} of it)"
    )
    return Choice("vllm" if worst <= _TOLERANCE * spread else "torch", why)


def _rows(candidates: Artifact) -> Iterator[Row]:
    for shard in candidates.shards():
        yield from read_shard(shard).to_pylist()


def _asked(row: Row) -> Row:
    """What a reward model reads of a row."""
    texts = [{"text": completion["text"]} for completion in row["completions"]]
    return {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "tools": row.get("tools"), "completions": texts}


def _score_by_vllm(source: RewardModel, options: VLLM, rows: list[Row]) -> list[float]:
    return _scores(_by_vllm(source, options), rows)


def _score_by_torch(source: RewardModel, rows: list[Row]) -> list[float]:
    from dpo_ray.scoring.classifier import TorchClassifier  # in the process that scores, and not in the driver

    return _scores(RewardModelScorer(source, TorchClassifier(source)), rows)


def _by_vllm(source: RewardModel, options: VLLM) -> RewardModelScorer:
    return RewardModelScorer(source, VLLMClassifier(model_of(source), options, source.max_tokens))


def _scores(scorer: RewardModelScorer, rows: list[Row]) -> list[float]:
    return [scored.score for of_row in scorer.score(rows) for scored in of_row]
