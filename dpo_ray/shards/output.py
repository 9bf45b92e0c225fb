"""What goes into a stage for one shard, and what comes out: a source in, a table and its counters out.

A source names files and places in them, by URI, so that it can travel to any worker: it is a frozen dataclass that
stands beside its worker, or `Shard` where the worker takes all rows of a shard.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Shard:
    """A shard of a finished artifact, all of its rows."""

    file: str
    """URI of the shard."""


@dataclass(frozen=True)
class ShardOutput:
    """What came of one shard."""

    table: pa.Table
    counters: Counter[str]
    """`read`, and rows dropped by reason."""
    quarantine: pa.Table | None = None
