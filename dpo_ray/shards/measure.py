"""Rows → counts for the data report, a shard at a time."""

from __future__ import annotations

from typing import Any

from dpo_ray.data.duplicates import read_kept
from dpo_ray.data.report import measure_pairs, measure_reference, measure_tokens, to_table
from dpo_ray.shards.output import ShardOutput

VERSION = 1
"""Of what is measured, here and in dpo_ray.data.report; another one makes all shards be measured again."""


def identity() -> dict[str, Any]:
    """What changes the counts, beside the rows."""
    return {"version": VERSION}


class MeasureShard:
    """A pairs, tokenized or reference shard → its part of the data report, as source["what"] says."""

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        measure = {"pairs": measure_pairs, "tokens": measure_tokens, "reference": measure_reference}[source["what"]]
        table, counters = read_kept(source)
        return ShardOutput(to_table(measure(table)), counters)
