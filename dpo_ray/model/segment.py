"""A pair in the packed row."""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """Where a pair lies in the packed row: its start, and the lengths of its three parts in tokens."""

    start: int
    shared: int
    chosen: int
    rejected: int
