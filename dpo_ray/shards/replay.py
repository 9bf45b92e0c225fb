"""Pairs of an earlier round → those that a later round trains on again, a shard at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dpo_ray.pairs import GENERATED_PAIRS
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard

VERSION = 1


def identity(share: float, round_number: int) -> dict[str, Any]:
    """What changes the rows, beside the pairs."""
    return {"rules": VERSION, "share": share, "round": round_number}


@dataclass(frozen=True)
class Earlier:
    """A shard of pairs, and how much of it is kept."""

    file: str
    """URI."""
    share: float
    """Of its training rows, by their hash; 1 keeps all rows, held-out ones too."""
    salt: str


class ReplayShard:
    """The rows of a shard that are kept."""

    def __call__(self, source: Earlier) -> ShardOutput:
        table = read_whole_shard(Location(source.file))
        counters = Counter(read=table.num_rows)
        if source.share < 1:
            ids = zip(table["pair_id"].to_pylist(), table["split"].to_pylist(), strict=True)
            keep = [split == "train" and _place(f"{source.salt}:{pair}") < source.share for pair, split in ids]
            table = table.filter(pa.array(keep, pa.bool_()))
            counters["not_replayed"] = len(keep) - table.num_rows
        return ShardOutput(table.select(GENERATED_PAIRS.names), counters)


def _place(text: str) -> float:
    """In [0, 1), by a hash."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13
