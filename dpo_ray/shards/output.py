"""What a stage does with one shard: a source in, a table and its counters out. No Ray here.

A source is a plain dict that names files and places in them, so that it can travel to any worker.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class ShardOutput:
    """What came of one shard."""

    table: pa.Table
    counters: Counter[str]
    """`read`, and rows dropped by reason."""
    quarantine: pa.Table | None = None
