"""Candidates → pairs, a shard at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.errors import ConfigError, RewardError
from dpo_ray.pairs import CANDIDATES, PreferencePair, pair_row, prompt_id
from dpo_ray.reward_source import reward_identity
from dpo_ray.shards.output import Shard
from dpo_ray.shards.pair import PairShard
from dpo_ray.storage.artifact import read_shard, write_shard
from dpo_ray.storage.location import Location


def question(text: str) -> tuple[Any, ...]:
    return ({"role": "user", "content": text},)


def candidates_shard(
    folder: Path, samples: dict[str, list[tuple[str, bool]]], tools: dict[str, str] | None = None
) -> Shard:
    """Prompt → its completions, and whether each is finished. tools: of some of the prompts."""
    of_prompts = tools or {}
    rows = [
        {
            "prompt_id": prompt_id(list(question(text)), of_prompts.get(text)),
            "split": "eval",
            "prompt": list(question(text)),
            "tools": of_prompts.get(text),
            "completions": [{"text": t, "finished": finished, "num_tokens": 3} for t, finished in of_prompt],
        }
        for text, of_prompt in samples.items()
    ]
    location = Location.of(folder) / "candidates.parquet"
    write_shard(location, pa.Table.from_pylist(rows, schema=CANDIDATES), {})
    return Shard(location.uri)


BY_LENGTH = """
def by_length(prompt, completion, finished):
    assert prompt.startswith("Say")
    return len(completion) if finished else -1.0
"""
"""A reward that shows what it was given."""


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a PairShard is told of a reward."""
    (tmp_path / "reward_by_length.py").write_text(BY_LENGTH)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "reward_by_length:by_length"
    return {"reward": name, "reward_source": str(reward_identity(name)["reward_source"])}


def test_scored_candidates_become_pairs(tmp_path: Path, reward: dict[str, str]):
    shard = candidates_shard(
        tmp_path,
        {
            "Say a": [("aa", True), ("aaaa", True), ("aaaaaa", False), ("aa ", True)],
            "Say b": [("b", True), ("c", True)],
            "Say c": [("c", True), ("", True)],
        },
    )
    output = PairShard(**reward, min_score_gap=1.0, pairs_per_prompt=1)(shard)
    # The longest answer was cut off, and so is the worst.
    [pair] = output.table.to_pylist()
    assert (pair["chosen"], pair["rejected"]) == ("aaaa", "aaaaaa")
    assert pair == pair_row(PreferencePair(question("Say a"), "aaaa", "aaaaaa"), "eval")
    assert output.counters == {
        "read": 3,
        "duplicate": 1,
        "tie": 1,
        "empty_response": 1,
        "too_few_distinct": 1,
        "without_pair": 2,
    }


def test_generated_pairs_keep_the_tools_that_the_model_was_shown(tmp_path: Path, reward: dict[str, str]):
    answers, tools = [("a", True), ("aaa", True)], json.dumps([{"name": "look_up"}])
    shard = candidates_shard(tmp_path, {"Say a": answers, "Say b": answers}, tools={"Say a": tools})
    table = PairShard(**reward, min_score_gap=1.0, pairs_per_prompt=1)(shard).table
    assert table["tools"].to_pylist() == [tools, None]
    with_tools = PreferencePair(question("Say a"), "aaa", "a", tools)
    assert table["pair_id"].to_pylist() == [with_tools.pair_id, PreferencePair(question("Say b"), "aaa", "a").pair_id]
    assert table["prompt_id"].to_pylist() == read_shard(Location(shard.file))["prompt_id"].to_pylist()


def test_a_reward_that_does_not_exist_fails_before_any_shard():
    with pytest.raises(ConfigError, match="no_such_reward"):
        PairShard("dpo_ray.rewards:no_such_reward", "", 0.1, 1)


def test_a_reward_that_is_another_one_on_the_worker_fails_before_any_shard(reward: dict[str, str]):
    with pytest.raises(ConfigError, match=r"reward_by_length:by_length has another source"):
        PairShard(reward["reward"], "0123456789abcdef", 0.1, 1)


def test_a_reward_that_fails_is_told_with_prompt_and_completion(tmp_path: Path, reward: dict[str, str]):
    shard = candidates_shard(tmp_path, {"Say a": [("aa", True)], "Name b": [("b", True)]})
    with pytest.raises(
        RewardError, match=r"completion 1 of the prompt \w+ \('Name b' → 'b'\): AssertionError, at .*:3 in"
    ):
        PairShard(**reward, min_score_gap=1.0, pairs_per_prompt=1)(shard)
