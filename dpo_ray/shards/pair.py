"""Sampled candidates → scored → pairs, a shard at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from dpo_ray.data.pairing import make_pairs
from dpo_ray.pairs import PAIRS
from dpo_ray.reward_source import require_same_source
from dpo_ray.rewards import load_reward, score_completions
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.artifact import read_shard
from dpo_ray.storage.location import Location


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

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        kept, counters = [], Counter[str]()
        for row in read_shard(Location(source["file"])).to_pylist():
            counters["read"] += 1
            texts = [c["text"] for c in row["completions"]]
            scores = score_completions(self.reward_name, self.reward, row)
            pairs, passed_over = make_pairs(
                row["prompt"],
                texts,
                scores,
                min_score_gap=self.min_score_gap,
                pairs_per_prompt=self.pairs_per_prompt,
            )
            counters.update(passed_over)
            counters["without_pair"] += not pairs
            kept += [
                {
                    "pair_id": pair.pair_id,
                    "prompt_id": row["prompt_id"],
                    "couple_id": pair.couple_id,
                    "split": row["split"],
                    "prompt": row["prompt"],
                    "chosen": pair.chosen,
                    "rejected": pair.rejected,
                }
                for pair in pairs
            ]
        return ShardOutput(pa.Table.from_pylist(kept, schema=PAIRS), counters)
