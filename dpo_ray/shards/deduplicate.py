"""Rows of pairs → their ids, a group of shards at a time → the rows that are left out, a bucket at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from dpo_ray.data.duplicates import REASONS, find, left_out_table
from dpo_ray.data.row_ids import ROW_IDS, read_bucket, row_ids
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.location import Location

VERSION = 2
"""Of how the rows that are left out are found; raised when that changes."""


def ids_identity() -> dict[str, Any]:
    """What changes the ids."""
    return {"columns": ROW_IDS.names}


def identity() -> dict[str, Any]:
    """What changes which rows are left out."""
    return {"rules": VERSION, "reasons": list(REASONS)}


@dataclass(frozen=True)
class Group:
    """Some shards of pairs that follow each other."""

    files: tuple[str, ...]
    """URIs."""


@dataclass(frozen=True)
class Bucket:
    """The rows of a range of prompts."""

    groups: tuple[str, ...]
    """URIs of the ids, a file a group."""
    number: int
    """From 0 on."""
    buckets: int
    """How many there are."""


class RowIdsShard:
    """Shards of pairs → the ids of their rows, by prompt."""

    def __call__(self, source: Group) -> ShardOutput:
        table = row_ids([Location(file) for file in source.files])
        return ShardOutput(table, Counter(read=table.num_rows))


class DuplicatesShard:
    """A bucket of rows → those of them that are left out."""

    def __call__(self, source: Bucket) -> ShardOutput:
        rows, names = read_bucket(map(Location, source.groups), source.number, source.buckets)
        table = left_out_table(rows, find(rows), names)
        counters = Counter[str](table["reason"].to_pylist())
        counters["read"] = len(rows.row)
        counters["kept"] = len(rows.row) - table.num_rows
        return ShardOutput(table, counters)
