"""Sampled candidates → scored → pairs, a shard at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from dpo_ray.config import Generate
from dpo_ray.data.pairing import make_pairs
from dpo_ray.pairs import PAIRS, pair_row
from dpo_ray.reward_source import require_same_source, reward_identity
from dpo_ray.rewards import load_reward, score_completions
from dpo_ray.shards.output import Shard, ShardOutput
from dpo_ray.storage.artifact import read_shard
from dpo_ray.storage.location import Location


def identity(options: Generate) -> dict[str, Any]:
    """What changes the pairs, beside the candidates."""
    return {
        **reward_identity(options.reward),
        "min_score_gap": options.min_score_gap,
        "pairs_per_prompt": options.pairs_per_prompt,
        "columns": PAIRS.names,
    }


class PairShard:
    """Candidates → scored → pairs.

    Args:
        reward_source: what the driver knows the reward by (dpo_ray.reward_source).

    Raises ConfigError where the reward cannot be imported or has another source here.
    """

    def __init__(self, reward: str, reward_source: str, min_score_gap: float, pairs_per_prompt: int):
        self.reward_name, self.reward = reward, load_reward(reward)
        require_same_source(reward, reward_source)
        self.min_score_gap = min_score_gap
        self.pairs_per_prompt = pairs_per_prompt

    def __call__(self, source: Shard) -> ShardOutput:
        kept, counters = [], Counter[str]()
        for row in read_shard(Location(source.file)).to_pylist():
            counters["read"] += 1
            texts = [c["text"] for c in row["completions"]]
            scores = score_completions(self.reward_name, self.reward, row)
            pairs, passed_over = make_pairs(
                row["prompt"],
                texts,
                scores,
                min_score_gap=self.min_score_gap,
                pairs_per_prompt=self.pairs_per_prompt,
                tools=row["tools"],
            )
            counters.update(passed_over)
            counters["without_pair"] += not pairs
            kept += [pair_row(pair, row["split"]) for pair in pairs]
        return ShardOutput(pa.Table.from_pylist(kept, schema=PAIRS), counters)
