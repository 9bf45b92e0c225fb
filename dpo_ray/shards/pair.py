"""Sampled candidates → scored → pairs, a shard at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from dpo_ray.config import Generate
from dpo_ray.data.pairing import make_pairs
from dpo_ray.pairs import PAIRS, pair_row
from dpo_ray.rewards import load_reward
from dpo_ray.shards.output import Shard, ShardOutput
from dpo_ray.storage.artifact import read_shard
from dpo_ray.storage.location import Location


def identity(options: Generate) -> dict[str, Any]:
    """What changes the pairs, beside the candidates."""
    return {
        "reward": options.reward,
        "min_score_gap": options.min_score_gap,
        "pairs_per_prompt": options.pairs_per_prompt,
        "columns": PAIRS.names,
    }


class PairShard:
    """Candidates → scored → pairs."""

    def __init__(self, reward: str, min_score_gap: float, pairs_per_prompt: int):
        self.reward = load_reward(reward)
        self.min_score_gap = min_score_gap
        self.pairs_per_prompt = pairs_per_prompt

    def __call__(self, source: Shard) -> ShardOutput:
        kept, counters = [], Counter[str]()
        for row in read_shard(Location(source.file)).to_pylist():
            counters["read"] += 1
            question = row["prompt"][-1]["content"]
            texts = [c["text"] for c in row["completions"]]
            scores = [self.reward(question, c["text"], c["finished"]) for c in row["completions"]]
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
