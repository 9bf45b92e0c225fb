"""What is left out of a shard, as tests write it."""

from __future__ import annotations

import numpy as np

from dpo_ray.data.duplicates import REASONS, LeftOut

Rows = dict[str, list[int]]
"""Reason → row numbers, ascending."""


def left_out(rows: Rows) -> LeftOut:
    """As stages hand it on."""
    found = sorted((row, REASONS.index(reason)) for reason, of_reason in rows.items() for row in of_reason)
    return LeftOut(
        np.array([row for row, _ in found], dtype=np.int64), np.array([code for _, code in found], dtype=np.int8)
    )


def rows_of(found: LeftOut) -> Rows:
    """And back again, in the order of REASONS."""
    return {
        reason: found.rows[found.reasons == code].tolist()
        for code, reason in enumerate(REASONS)
        if (found.reasons == code).any()
    }
