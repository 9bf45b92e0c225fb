"""Rows of pairs → those that are left out, a bucket at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from dpo_ray.data.duplicates import REASONS, find, left_out_table, read_bucket
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.artifact import open_artifact
from dpo_ray.storage.location import Location

VERSION = 1
"""Of how the rows that are left out are found; raised when that changes."""


def identity() -> dict[str, Any]:
    """What changes which rows are left out."""
    return {"rules": VERSION, "reasons": list(REASONS)}


@dataclass(frozen=True)
class Bucket:
    """The rows of a pairs artifact whose prompts have a certain hash (see dpo_ray.data.duplicates)."""

    artifact: str
    """URI of its folder."""
    number: int
    """From 0 on."""
    buckets: int
    """How many there are."""


class DuplicatesShard:
    """A bucket of a pairs artifact's rows → those of them that are left out."""

    def __call__(self, source: Bucket) -> ShardOutput:
        pairs = open_artifact(Location(source.artifact))
        shards = pairs.shards()
        rows = read_bucket(shards, source.number, source.buckets)
        table = left_out_table(rows, find(rows), [shard.name for shard in shards])
        counters = Counter[str](table["reason"].to_pylist())
        counters["read"] = len(rows.row)
        counters["kept"] = len(rows.row) - table.num_rows
        return ShardOutput(table, counters)
