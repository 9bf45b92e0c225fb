"""Rows that are left out of training because of other rows: duplicates, contradictions, and prompts that are held out.

They are found from ids alone. Rows that concern each other have the same prompt, and so each range of prompts, a
bucket, is judged by itself. Its memory depends on its number of rows, not on their text. The number of buckets does not
change what is found.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.data.row_ids import RowIds
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard

REASONS = ("duplicate", "contradiction", "prompt_in_eval")
"""duplicate: an earlier row holds the same pair. contradiction: another row judges the same answers the other way; all
such rows are left out, because it is not known which is right. prompt_in_eval: a training row's prompt is held out."""

LEFT_OUT = pa.schema([("shard", pa.string()), ("row", pa.int64()), ("reason", pa.string())])
"""A row that is left out: the name of its shard in the pairs artifact, its place in the shard, and the reason."""

ROWS_PER_BUCKET = 4_000_000  # 37 bytes a row, and some 400 MiB in all while a bucket is judged


@dataclass(frozen=True)
class LeftOut:
    """Rows of one shard that are left out, n of them."""

    rows: np.ndarray
    """[n] int64, ascending"""
    reasons: np.ndarray
    """[n] int8, which of REASONS"""

    def counts(self) -> dict[str, int]:
        """Reason → rows."""
        number = np.bincount(self.reasons, minlength=len(REASONS))
        return {reason: int(n) for reason, n in zip(REASONS, number, strict=True) if n}

    def content(self) -> str:
        """16 hex digits over the rows and their reasons."""
        return hashlib.sha256(self.rows.tobytes() + self.reasons.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class PairsShard:
    """A shard of pairs, canonical, tokenized or scored, and which of its rows are left out."""

    file: str
    """URI of the shard."""
    left_out: LeftOut | None = None


def num_buckets(rows: int, rows_per_bucket: int = ROWS_PER_BUCKET) -> int:
    """How many buckets hold about rows_per_bucket rows each; at least one."""
    return max(1, -(-rows // rows_per_bucket))


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
    # Names and reasons as numbers, for there may be as many rows as memory holds.
    coded = [
        pa.table(
            {
                "shard": table["shard"].combine_chunks().dictionary_encode(),
                "row": table["row"].combine_chunks(),
                "reason": pc.index_in(table["reason"], pa.array(REASONS)).combine_chunks().cast(pa.int8()),
            }
        )
        for table in tables
    ]
    if not coded:
        return {}
    whole = pa.concat_tables(coded).unify_dictionaries().combine_chunks()
    if not whole.num_rows:
        return {}
    shards = whole["shard"].chunk(0)
    number, rows, reasons = shards.indices.to_numpy(), whole["row"].to_numpy(), whole["reason"].to_numpy()
    order = np.lexsort((rows, number))
    edges = np.cumsum(np.bincount(number, minlength=len(shards.dictionary)))[:-1]
    return {
        name: LeftOut(rows[part], reasons[part])
        for name, part in zip(shards.dictionary.to_pylist(), np.split(order, edges), strict=True)
    }


def read_kept(source: PairsShard) -> tuple[pa.Table, Counter[str]]:
    """The rows of a shard that are not left out; and `read`, and rows left out by reason."""
    table = read_whole_shard(Location(source.file))
    counters = Counter({"read": table.num_rows})
    if source.left_out is None:
        return table, counters
    counters.update(source.left_out.counts())
    keep = np.ones(table.num_rows, dtype=bool)
    keep[source.left_out.rows] = False
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
