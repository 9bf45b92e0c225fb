"""Rows → counts for the data report, a shard at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dpo_ray.data.duplicates import PairsShard, read_kept
from dpo_ray.data.report import measure_pairs, measure_reference, measure_tokens, to_table
from dpo_ray.shards.output import ShardOutput

VERSION = 2
"""Of what is measured, here and in dpo_ray.data.report; another one makes all shards be measured again."""


def identity() -> dict[str, Any]:
    """What changes the counts, beside the rows."""
    return {"version": VERSION}


What = Literal["pairs", "tokens", "reference"]


@dataclass(frozen=True)
class MeasuredShard:
    """A shard, and what is measured of it: of canonical pairs, of tokenized ones, or of those with reference scores."""

    what: What
    shard: PairsShard


class MeasureShard:
    """A shard → its part of the data report."""

    def __call__(self, source: MeasuredShard) -> ShardOutput:
        measure = {"pairs": measure_pairs, "tokens": measure_tokens, "reference": measure_reference}[source.what]
        table, counters = read_kept(source.shard)
        return ShardOutput(to_table(measure(table)), counters)
