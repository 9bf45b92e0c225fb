"""Candidates of several models for the same prompts → one row for each prompt, a shard at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dpo_ray.pairs import CANDIDATES
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard

VERSION = 1


def identity() -> dict[str, Any]:
    """What changes the rows, beside the candidates."""
    return {"rules": VERSION}


@dataclass(frozen=True)
class OfModels:
    """Shards of candidates for the same prompts, a model each."""

    files: tuple[str, ...]
    """URIs."""


class MergeShard:
    """Candidates of several models → each prompt with the completions of all, in the order of the models.

    A prompt that is too long for one model's tokenizer has the completions of the others.
    """

    def __call__(self, source: OfModels) -> ShardOutput:
        rows: dict[str, dict[str, Any]] = {}
        for file in source.files:
            for row in read_whole_shard(Location(file)).to_pylist():
                if row["prompt_id"] in rows:
                    rows[row["prompt_id"]]["completions"] += row["completions"]
                else:
                    rows[row["prompt_id"]] = row
        table = pa.Table.from_pylist(list(rows.values()), schema=CANDIDATES)
        return ShardOutput(table, Counter(read=table.num_rows))
