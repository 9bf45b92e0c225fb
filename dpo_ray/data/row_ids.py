"""Ids of the rows of pairs, without their texts: written once for a group of shards, and read a range of prompts at a
time.

A file of a group is sorted by prompt, so that whoever looks at some prompts fetches a part of it, whatever the number
of parts. New shards make new groups: the others stay what they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.storage.artifact import read_shard
from dpo_ray.storage.location import Location

ROW_IDS = pa.schema(
    [
        ("prompt", pa.uint64()),
        ("pair", pa.uint64()),
        ("couple", pa.uint64()),
        ("held_out", pa.bool_()),
        ("shard", pa.int32()),
        ("row", pa.int64()),
    ]
)
"""prompt_id, pair_id and couple_id as numbers, and where the row lies; `shard` counts from 0 in the group."""

_SHARDS = b"dpo_ray.shards"
_MOST_PROMPTS = 2**64
_COLUMNS = ["pair_id", "prompt_id", "couple_id", "split"]


@dataclass(frozen=True)
class RowIds:
    """Ids of n rows; those of one prompt in the order of shards and rows."""

    prompt: np.ndarray
    """[n] uint64"""
    pair: np.ndarray
    """[n] uint64"""
    couple: np.ndarray
    """[n] uint64"""
    held_out: np.ndarray
    """[n] bool"""
    shard: np.ndarray
    """[n] int32, which of the shards"""
    row: np.ndarray
    """[n] int64, row in the shard"""

    @classmethod
    def of(cls, table: pa.Table) -> RowIds:
        """Of a table of ROW_IDS."""
        return cls(*(table[column.name].to_numpy() for column in fields(cls)))


def row_ids(shards: Sequence[Location]) -> pa.Table:
    """Ids of all rows of some shards of pairs, by prompt, as ROW_IDS with the shards' names. Raises DataError."""
    parts = [_ids(read_shard(shard, columns=_COLUMNS), number) for number, shard in enumerate(shards)]
    table = pa.concat_tables(parts)
    order = np.argsort(table["prompt"].to_numpy(), kind="stable")
    names = json.dumps([shard.name for shard in shards]).encode()
    return table.take(pa.array(order)).replace_schema_metadata({_SHARDS: names})


def read_bucket(groups: Iterable[Location], bucket: int, buckets: int) -> tuple[RowIds, list[str]]:
    """Ids of the rows of one of so many equal ranges of prompts, and the names of the shards of all groups.

    Args:
        groups: files that row_ids made. Row groups with no such prompt are not fetched.

    Raises DataError.
    """
    low, high = (_MOST_PROMPTS * edge // buckets for edge in (bucket, bucket + 1))
    prompt = pc.field("prompt")
    inside = (prompt >= pa.scalar(low, pa.uint64())) & (prompt <= pa.scalar(high - 1, pa.uint64()))
    parts, names = [ROW_IDS.empty_table()], list[str]()
    for group in groups:
        table = read_shard(group, columns=ROW_IDS.names, rows=inside)
        shards = pc.add(table["shard"], pa.scalar(len(names), pa.int32()))
        parts.append(table.set_column(ROW_IDS.names.index("shard"), "shard", shards))
        names += json.loads(table.schema.metadata[_SHARDS])
    return RowIds.of(pa.concat_tables([part.replace_schema_metadata() for part in parts])), names


def id_numbers(ids: pa.ChunkedArray) -> np.ndarray:
    """Ids of 16 hex digits as [n] uint64."""
    digits = ids.combine_chunks().cast(pa.binary()).cast(pa.binary(16))
    if not len(digits):
        return np.zeros(0, dtype=np.uint64)
    text = np.frombuffer(digits.buffers()[1], dtype=np.uint8)[digits.offset * 16 :][: len(digits) * 16]
    nibbles = np.where(text >= ord("a"), text - (ord("a") - 10), text - ord("0")).reshape(-1, 2)
    halves: np.ndarray = (nibbles[:, 0] << 4 | nibbles[:, 1]).astype(np.uint8).view(">u8").astype(np.uint64)
    return halves


def _ids(table: pa.Table, shard: int) -> pa.Table:
    return pa.table(
        {
            "prompt": id_numbers(table["prompt_id"]),
            "pair": id_numbers(table["pair_id"]),
            "couple": id_numbers(table["couple_id"]),
            "held_out": pc.equal(table["split"], "eval"),
            "shard": np.full(table.num_rows, shard, dtype=np.int32),
            "row": np.arange(table.num_rows, dtype=np.int64),
        },
        schema=ROW_IDS,
    )
