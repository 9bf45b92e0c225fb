"""Rows that are left out of training because of other rows: duplicates, contradictions, and prompts that are held out.

They are found from ids alone. A hash of its prompt puts each row into a bucket. Rows that concern each other have the
same prompt and so the same bucket, and each bucket is judged by itself. Its memory depends on its number of rows, not
on their text. The number of buckets does not change what is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.storage.artifact import read_shard
from dpo_ray.storage.location import Location

REASONS = ("duplicate", "contradiction", "prompt_in_eval")
"""duplicate: an earlier row holds the same pair. contradiction: another row judges the same answers the other way; all
such rows are left out, because it is not known which is right. prompt_in_eval: a training row's prompt is held out."""

LEFT_OUT = pa.schema([("shard", pa.string()), ("row", pa.int64()), ("reason", pa.string())])
"""A row that is left out: the name of its shard in the pairs artifact, its place in the shard, and the reason."""

ROWS_PER_BUCKET = 4_000_000  # 37 bytes a row, and some 400 MiB in all while a bucket is judged

LeftOut = dict[str, list[int]]
"""Reason → row numbers of one shard, ascending."""


@dataclass(frozen=True)
class PairsShard:
    """A shard of pairs, canonical, tokenized or scored, and which of its rows are left out."""

    file: str
    """URI of the shard."""
    left_out: LeftOut = field(default_factory=dict)


@dataclass(frozen=True)
class RowIds:
    """Ids of n rows, in the order of shards and rows."""

    pair: np.ndarray
    """[n] uint64"""
    prompt: np.ndarray
    """[n] uint64"""
    couple: np.ndarray
    """[n] uint64"""
    held_out: np.ndarray
    """[n] bool"""
    shard: np.ndarray
    """[n] int32, which of the shards"""
    row: np.ndarray
    """[n] int64, row in the shard"""


def num_buckets(rows: int, rows_per_bucket: int = ROWS_PER_BUCKET) -> int:
    """How many buckets hold about rows_per_bucket rows each; at least one."""
    return max(1, -(-rows // rows_per_bucket))


def read_bucket(shards: Iterable[Location], bucket: int, buckets: int) -> RowIds:
    """Ids of the rows of a bucket. The pairs shards are read one after another. Raises DataError."""
    parts = [
        _bucket_of(
            read_shard(location, columns=["pair_id", "prompt_id", "couple_id", "split"]), number, bucket, buckets
        )
        for number, location in enumerate(shards)
    ]
    if not parts:
        raise ValueError("a bucket is read from at least one shard")
    return RowIds(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(RowIds)))


def find(rows: RowIds) -> np.ndarray:
    """[n] for each row -1, or the index in REASONS of why it is left out.

    Of several reasons it is the first of contradiction, prompt_in_eval, duplicate. Of duplicates the first row stays. A
    prompt is held out if any held-out row has it, even a row that is left out itself.
    """
    found = np.full(len(rows.row), -1, dtype=np.int8)
    # Before duplicates: a judgement does not win over its opposite by being repeated.
    found[_contradictory(rows)] = REASONS.index("contradiction")
    also_held_out = np.isin(rows.prompt, rows.prompt[rows.held_out]) & ~rows.held_out
    found[also_held_out & (found < 0)] = REASONS.index("prompt_in_eval")
    rest = np.flatnonzero(found < 0)
    _, first = np.unique(rows.pair[rest], return_index=True)
    found[np.delete(rest, first)] = REASONS.index("duplicate")
    return found


def left_out_table(rows: RowIds, found: np.ndarray, names: Sequence[str]) -> pa.Table:
    """The rows of a bucket that are left out, as LEFT_OUT. names: those of the shards."""
    places = np.flatnonzero(found >= 0)
    return pa.table(
        {
            "shard": pa.array(names, pa.string()).take(pa.array(rows.shard[places])),
            "row": rows.row[places],
            "reason": pa.array(REASONS).take(pa.array(found[places])),
        },
        schema=LEFT_OUT,
    )


def by_shard(tables: Iterable[pa.Table]) -> dict[str, LeftOut]:
    """Name of a shard → what is left out of it. Shards that lose no row are absent."""
    places: dict[str, LeftOut] = {}
    for table in tables:
        for shard, row, reason in zip(*(table[name].to_pylist() for name in LEFT_OUT.names), strict=True):
            places.setdefault(shard, {}).setdefault(reason, []).append(row)
    return {
        shard: {reason: sorted(of_shard[reason]) for reason in REASONS if reason in of_shard}
        for shard, of_shard in places.items()
    }


def read_kept(source: PairsShard) -> tuple[pa.Table, Counter[str]]:
    """The rows of a shard that are not left out; and `read`, and rows left out by reason."""
    table = read_shard(Location(source.file))
    counters = Counter({"read": table.num_rows, **{reason: len(rows) for reason, rows in source.left_out.items()}})
    if not source.left_out:
        return table, counters
    keep = np.ones(table.num_rows, dtype=bool)
    for rows in source.left_out.values():
        keep[rows] = False
    return table.filter(pa.array(keep)), counters


def _contradictory(rows: RowIds) -> np.ndarray:
    """[n] bool: another row holds the same answers, judged otherwise."""
    order = np.argsort(rows.couple, kind="stable")
    couples, pairs = rows.couple[order], rows.pair[order]
    if not len(order):
        return np.zeros(0, dtype=bool)
    starts = np.flatnonzero(np.r_[True, couples[1:] != couples[:-1]])
    differ = np.minimum.reduceat(pairs, starts) != np.maximum.reduceat(pairs, starts)
    result = np.empty(len(order), dtype=bool)
    result[order] = np.repeat(differ, np.diff(np.r_[starts, len(order)]))
    return result


def _bucket_of(table: pa.Table, shard: int, bucket: int, buckets: int) -> RowIds:
    prompt = _numbers(table["prompt_id"])
    mine = np.flatnonzero(prompt % np.uint64(buckets) == bucket)
    held_out = pc.equal(table["split"], "eval").to_numpy()
    return RowIds(
        pair=_numbers(table["pair_id"])[mine],
        prompt=prompt[mine],
        couple=_numbers(table["couple_id"])[mine],
        held_out=held_out[mine],
        shard=np.full(len(mine), shard, dtype=np.int32),
        row=mine.astype(np.int64),
    )


def _numbers(ids: pa.ChunkedArray) -> np.ndarray:
    """Ids of 16 hex digits as [n] uint64."""
    digits = ids.combine_chunks().cast(pa.binary()).cast(pa.binary(16))
    if not len(digits):
        return np.zeros(0, dtype=np.uint64)
    text = np.frombuffer(digits.buffers()[1], dtype=np.uint8)[digits.offset * 16 :][: len(digits) * 16]
    nibbles = np.where(text >= ord("a"), text - (ord("a") - 10), text - ord("0")).reshape(-1, 2)
    halves: np.ndarray = (nibbles[:, 0] << 4 | nibbles[:, 1]).astype(np.uint8).view(">u8").astype(np.uint64)
    return halves
