"""The reward of candidates: their scores by each source, and the pairs that are made by the weighted sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dpo_ray.config import VLLM, CandidatePairing, Config, ImplicitReward, Judge, Reward, RewardModel, Rule, Source
from dpo_ray.on_ray.pool import Pool, ShardTask, each_its_own, rows_pool, shard_stage, shard_tasks, torch_pool
from dpo_ray.on_ray.reward_model import reward_model_work
from dpo_ray.on_ray.vllm_engine import VLLMChat, vllm_pool
from dpo_ray.on_ray.vllm_version import require_vllm
from dpo_ray.scoring.judge import JudgeScorer, template_of
from dpo_ray.scoring.models import model_of, reference_of
from dpo_ray.shards.pair import PairShard, ScoredShard
from dpo_ray.shards.pair import identity as pairs_identity
from dpo_ray.shards.reward import (
    EndpointJudgeShard,
    ImplicitShard,
    RewardShard,
    RuleShard,
    implicit_identity,
    judge_identity,
    rule_identity,
)
from dpo_ray.storage.artifact import Artifact, digest
from dpo_ray.storage.location import Location


def score_candidates(
    output: Location, config: Config, source: Source, candidates: Artifact, across: int | None = None
) -> tuple[Artifact, bool]:
    """What a source gives to each completion: an artifact of its own, whatever the source's weight.

    Args:
        across: of candidates of two models, the samples of the first; a judge compares none but these with the others.
    """
    identity, pool = _work(output, config, source, candidates, across)
    return shard_stage(
        output,
        "rewards",
        identity=identity,
        inputs={"candidates": candidates.fingerprint},
        tasks=each_its_own(shard_tasks(candidates)),  # a shard for each of theirs, also of those that are empty
        pool=pool,
        unit="prompts",
    )


def _work(
    output: Location, config: Config, source: Source, candidates: Artifact, across: int | None
) -> tuple[dict[str, Any], Pool]:
    """What changes a source's scores, and who computes them."""
    match source:
        case Rule():
            identity = rule_identity(source)
            arguments = {"rule": source, "source": identity["reward_source"]}
            return identity, rows_pool(config, RuleShard, arguments)
        case RewardModel():
            return reward_model_work(output, config, source, candidates)
        case Judge():
            arguments = {"judge": source, "template": template_of(source), "across": across}
            if source.endpoint is not None:
                # One process for the whole cluster, for the rate is the server's.
                pool = replace(rows_pool(config, EndpointJudgeShard, arguments, stateless=False), num_actors=1)
            else:
                require_vllm("A judge that is served here")
                pool = vllm_pool(config, vllm_judge_shard, {**arguments, "options": config.vllm})
            return judge_identity(source, across), pool
        case ImplicitReward():
            reference = reference_of(source, config.model)
            arguments = {"source": source, "reference": reference}
            return implicit_identity(source, reference), torch_pool(config, ImplicitShard, arguments)


def vllm_judge_shard(judge: Judge, template: str, across: int | None, options: VLLM) -> RewardShard:
    """The worker of a judge that vLLM serves."""
    chat = VLLMChat(model_of(judge), options, judge.max_model_len, judge.max_tokens, judge.temperature)
    return RewardShard(JudgeScorer(judge, template, chat, across))


def pair_candidates(
    output: Location,
    config: Config,
    rules: CandidatePairing,
    reward: Reward,
    candidates: Artifact,
    scores: dict[str, Artifact],
) -> tuple[Artifact, bool]:
    """Pairs of candidates. scores: source → what it gives to them."""
    weights = {source.label: source.weight for source in reward}
    return shard_stage(
        output,
        "pairs",
        identity=pairs_identity(rules, weights),
        inputs={"candidates": candidates.fingerprint, **{f"rewards/{n}": a.fingerprint for n, a in scores.items()}},
        tasks=_tasks(candidates, scores),
        pool=rows_pool(
            config, PairShard, {"rules": rules, "weights": weights, "made_by": _made_by(candidates, scores)}
        ),
        unit="prompts",
    )


def _tasks(candidates: Artifact, scores: dict[str, Artifact]) -> list[ShardTask[ScoredShard]]:
    tasks = each_its_own(shard_tasks(candidates))
    of_sources = {name: shard_tasks(artifact) for name, artifact in scores.items()}
    return [
        ShardTask(
            source=ScoredShard(task.source.file, {name: found[n].source.file for name, found in of_sources.items()}),
            content=digest([task.content, {name: found[n].content for name, found in of_sources.items()}]),
            rows=task.rows,
        )
        for n, task in enumerate(tasks)
    ]


def _made_by(candidates: Artifact, scores: dict[str, Artifact]) -> dict[str, Any]:
    """What all pairs of these candidates have in common: their sampling, and their scores' sources."""
    return {
        "candidates": candidates.fingerprint,
        "sampling": candidates.manifest.identity,
        "rewards": {name: artifact.fingerprint for name, artifact in scores.items()},
    }
