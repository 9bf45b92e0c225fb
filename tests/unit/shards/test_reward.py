"""Candidates → their scores by a source, a shard at a time."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.config import Rule
from dpo_ray.errors import ConfigError, RewardError
from dpo_ray.pairs import CANDIDATES, REWARDS
from dpo_ray.shards.output import Shard
from dpo_ray.shards.reward import RuleShard, rule_identity
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location

BY_LENGTH = """
def by_length(prompt, completion, finished, *, off=0):
    assert prompt.startswith("Say")
    return {"characters": len(completion) - off, "finished": -2.0 * (not finished)}
"""
"""A reward that shows what it was given."""


def candidates(folder: Path, prompts: dict[str, list[tuple[str, bool]]]) -> Shard:
    rows = [
        {
            "prompt_id": f"{n:016x}",
            "split": "train",
            "prompt": [{"role": "user", "content": prompt}],
            "completions": [{"text": text, "finished": end, "num_tokens": 1} for text, end in samples],
        }
        for n, (prompt, samples) in enumerate(prompts.items())
    ]
    location = Location.of(folder) / "candidates.parquet"
    write_shard(location, pa.Table.from_pylist(rows, schema=CANDIDATES), {})
    return Shard(location.uri)


@pytest.fixture
def rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rule:
    (tmp_path / "reward_by_length.py").write_text(BY_LENGTH)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Rule(function="reward_by_length:by_length", arguments={"off": 1})


def shard_of(rule: Rule) -> RuleShard:
    return RuleShard(rule, rule_identity(rule)["reward_source"])


def test_each_completion_has_its_score_and_its_parts(tmp_path: Path, rule: Rule):
    output = shard_of(rule)(candidates(tmp_path, {"Say a": [("a", True), ("aaa", False)], "Say b": []}))
    assert output.table.schema.equals(REWARDS)
    assert output.table["prompt_id"].to_pylist() == [f"{n:016x}" for n in range(2)]
    assert output.table["scores"].to_pylist() == [[0.0, 0.0], []]
    first, second = output.table["parts"].to_pylist()[0]
    assert (dict(first), dict(second)) == ({"characters": 0, "finished": 0}, {"characters": 2, "finished": -2})
    assert output.counters == {"read": 2, "completions": 2}


def test_the_identity_holds_what_changes_the_scores_and_no_more(rule: Rule):
    assert rule_identity(rule) == rule_identity(rule.model_copy(update={"weight": 3.0, "name": "mine"}))
    assert rule_identity(rule) != rule_identity(rule.model_copy(update={"arguments": {"off": 2}}))


def test_a_reward_that_does_not_exist_fails_before_any_shard():
    with pytest.raises(ConfigError, match="no_such_reward"):
        RuleShard(Rule(function="dpo_ray.rewards:no_such_reward"), "")


def test_a_reward_that_is_another_one_on_the_worker_fails_before_any_shard(rule: Rule):
    with pytest.raises(ConfigError, match=r"reward_by_length:by_length has another source"):
        RuleShard(rule, "0123456789abcdef")


def test_a_reward_that_fails_is_told_with_prompt_and_completion(tmp_path: Path, rule: Rule):
    shard = candidates(tmp_path, {"Say a": [("aa", True)], "Name b": [("b", True)]})
    with pytest.raises(
        RewardError, match=r"completion 1 of the prompt \w+ \('Name b' → 'b'\): AssertionError, at .*:3 in"
    ):
        shard_of(rule)(shard)
