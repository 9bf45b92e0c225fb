"""Scored candidates → pairs, a shard at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dpo_ray.config import CandidatePairing
from dpo_ray.data.pairing import RULES, Candidate, Couple, make_pairs
from dpo_ray.errors import DataError
from dpo_ray.pairs import GENERATED_PAIRS, pair_row
from dpo_ray.scoring.scorer import weighted
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.artifact import read_shard
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard


def identity(rules: CandidatePairing, weights: dict[str, float]) -> dict[str, Any]:
    """What changes the pairs, beside the candidates and their scores. weights: source → its weight."""
    return {
        "rules": rules.model_dump(mode="json"),
        "rules_version": RULES,
        "weights": weights,
        "columns": GENERATED_PAIRS.names,
    }


@dataclass(frozen=True)
class ScoredShard:
    """A shard of candidates, and the shards of the same rows' scores."""

    candidates: str
    """URI."""
    rewards: dict[str, str]
    """Source → URI."""


class PairShard:
    """Scored candidates → pairs.

    Args:
        weights: source → its weight in the reward.
        made_by: what the lineage of all pairs holds.
    """

    def __init__(self, rules: CandidatePairing, weights: dict[str, float], made_by: dict[str, Any]):
        self.rules = rules
        self.weights = weights
        self.made_by = made_by

    def __call__(self, source: ScoredShard) -> ShardOutput:
        kept, counters = [], Counter[str]()
        for row, scores in _scored_rows(source):
            counters["read"] += 1
            couples, passed_over = make_pairs(row["prompt"], self._candidates(row, scores), self.rules)
            counters.update(passed_over)
            counters["without_pair"] += not couples
            for couple in couples:
                pair = couple.pair(row["prompt"], row["tools"])
                kept.append({**pair_row(pair, row["split"]), "lineage": self._lineage(couple)})
        return ShardOutput(pa.Table.from_pylist(kept, schema=GENERATED_PAIRS), counters)

    def _candidates(self, row: dict[str, Any], scores: dict[str, list[float]]) -> list[Candidate]:
        rewards = weighted(list(scores.values()), [self.weights[name] for name in scores])
        return [
            Candidate(
                text=completion["text"],
                score=rewards[n],
                finished=completion["finished"],
                logprob=completion["logprob"],
                model=completion["model"] or "",
                system_prompt=completion["system_prompt"],
                by_source={name: self.weights[name] * of_source[n] for name, of_source in scores.items()},
                origin={
                    "sample": n,
                    "model": completion["model"],
                    "system_prompt": completion["system_prompt"],
                    "scores": {name: of_source[n] for name, of_source in scores.items()},
                },
            )
            for n, completion in enumerate(row["completions"])
        ]

    def _lineage(self, couple: Couple) -> str:
        sides = {name: side.origin for name, side in couple._asdict().items()}
        return json.dumps(self.made_by | sides, sort_keys=True)


def _scored_rows(source: ScoredShard) -> Iterator[tuple[dict[str, Any], dict[str, list[float]]]]:
    """The rows of candidates, each with its completions' scores by source. Raises DataError where they do not match."""
    rows = read_whole_shard(Location(source.candidates)).to_pylist()
    by_source = {}
    for name, file in source.rewards.items():
        table = read_shard(Location(file), columns=["prompt_id", "scores"])
        if table["prompt_id"].to_pylist() != [row["prompt_id"] for row in rows]:
            raise DataError(
                f"{file} holds the scores of other prompts than {source.candidates} has. Remove it; the stage that "
                "made it will compute it again."
            )
        by_source[name] = table["scores"].to_pylist()
    for n, row in enumerate(rows):
        yield row, {name: scores[n] for name, scores in by_source.items()}
