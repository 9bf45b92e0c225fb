"""Proportions with their 95% intervals, and quantiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A proportion with its 95% interval over n independent observations."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def wilson(value: float, n: int) -> Estimate:
    """Wilson's score interval (Wilson 1927) for a proportion.

    Also for the mean of n scores in [0, 1], for which it is conservative: no variable in [0, 1] varies more
    than the 0/1 variable of the same mean. Raises ValueError for n = 0.
    """
    if n <= 0:
        raise ValueError("an estimate needs at least one observation")
    z2 = _Z95**2
    centre = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(value * (1 - value) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(value=value, low=max(0.0, centre - half), high=min(1.0, centre + half), n=n)


def quantiles(values: np.ndarray) -> dict[str, float]:
    """p50, p90, p99 and max of a sample that is not empty."""
    p50, p90, p99, top = np.quantile(values, [0.5, 0.9, 0.99, 1.0])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(top)}
