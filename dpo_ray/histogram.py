"""Samples of any size as counts in a few bins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

FEWEST_BINS, MOST_BINS = 8, 40
_TAIL = 0.005
_BY_ROOT = 3.0
"""Bins for the cube root of the number of values, as of Rice's rule, which has 2."""
_LONG = 3.0
"""A range that is so many times as wide as that of all but the tails has its tails in the outermost bins."""


def histograms(
    samples: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray] | None = None, *, whole: bool = False
) -> dict[str, Any] | None:
    """Counts of several samples in the same bins, so that they can be laid over each other.

    Returns `edges` [b + 1], `counts` (name → [b]) and `is_open`: whether the outermost bins hold what lies beyond their
    edges. None where there is no finite value.

    Args:
        samples: name → values [n].
        counts: name → how often each value is there [n]; left out: once.
        whole: the values are whole numbers, and so are the widths of the bins.
    """
    often = counts if counts is not None else {name: np.ones(len(of)) for name, of in samples.items()}
    every = np.concatenate([np.asarray(of, dtype=float) for of in samples.values()])
    weights = np.concatenate([often[name] for name in samples])[np.isfinite(every)]
    every = every[np.isfinite(every)]
    if not len(every):
        return None
    low, high = float(every.min()), float(every.max())
    inner = _quantile(every, weights, _TAIL), _quantile(every, weights, 1 - _TAIL)
    is_open = high - low > _LONG * (inner[1] - inner[0]) > 0
    if is_open:
        low, high = inner
    most = int(np.clip(np.ceil(_BY_ROOT * np.cbrt(weights.sum() / len(samples))), FEWEST_BINS, MOST_BINS))
    edges = _whole_edges(low, high, most) if whole else np.linspace(low, high, most + 1) if high > low else _around(low)
    binned = {name: _binned(np.asarray(of, dtype=float), often[name], edges) for name, of in samples.items()}
    return {"edges": [float(f"{edge:.6g}") for edge in edges], "counts": binned, "is_open": bool(is_open)}


def _binned(values: np.ndarray, counts: np.ndarray, edges: np.ndarray) -> list[int]:
    finite = np.isfinite(values)
    inside = np.clip(values[finite], edges[0], edges[-1])
    found = np.histogram(inside, edges, weights=counts[finite])[0]
    return [int(count) for count in np.rint(found)]


def _quantile(values: np.ndarray, counts: np.ndarray, share: float) -> float:
    """By nearest rank."""
    order = np.argsort(values)
    until = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(until, share * until[-1])])


def _whole_edges(low: float, high: float, most: int) -> np.ndarray:
    """Halfway between whole numbers, at most so many bins of one width."""
    first, last = int(np.floor(low)), int(np.ceil(high))
    width = -(-(last - first + 1) // most)
    return first - 0.5 + width * np.arange(-(-(last - first + 1) // width) + 1)


def _around(value: float) -> np.ndarray:
    half = max(0.5, abs(value) * 0.05)
    return np.array([value - half, value + half])
