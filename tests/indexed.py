"""Tokenized rows and their index, made as stages make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from dpo_ray.pairs import LENGTHS, TOKENIZED
from dpo_ray.storage.artifact import Artifact, publish, write_shard
from dpo_ray.storage.location import Location
from dpo_ray.training.index import PlanIndex, index_of


def with_lengths(rows: Sequence[dict], schema: pa.Schema = TOKENIZED) -> pa.Table:
    """Rows of ids as a table, the columns that count them filled in."""
    sides = [name.replace("_tokens", "_ids") for name in LENGTHS]
    counts = [{name: len(row[ids]) for name, ids in zip(LENGTHS, sides, strict=True)} for row in rows]
    return pa.Table.from_pylist([row | count for row, count in zip(rows, counts, strict=True)], schema=schema)


def artifact_of(folder: Path | Location, tables: Sequence[pa.Table], kind: str = "tokenized") -> Artifact:
    """A shard a table."""
    location = place(folder) / kind
    files = [write_shard(location / f"{n}.parquet", table, {}) for n, table in enumerate(tables)]
    return publish(location, kind, identity={}, inputs={}, files=files)


def indices(
    folder: Path | Location, tables: Sequence[pa.Table], eval_fraction: float = 1.0
) -> tuple[PlanIndex, PlanIndex]:
    """Of the rows to train on, and of the held-out ones."""
    return index_of(place(folder) / "out", artifact_of(folder, tables), eval_fraction)


def place(folder: Path | Location) -> Location:
    return folder if isinstance(folder, Location) else Location.of(folder)
