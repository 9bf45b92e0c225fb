"""Rates with their 95% intervals, statistics of a sample of prompts by the bootstrap, and quantiles.

How often the intervals hold what they are about was simulated: benchmarks/intervals.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

_Z95 = 1.959963984540054
_ALPHA = 0.05
_NEEDED = 100
_NEAR, _NEARER = 0.2, 0.1  # to 0 or to 1
_DRAWS = 2000
_HALVINGS = 60  # of [0, 1]: beyond a double's precision


@dataclass(frozen=True)
class Estimate:
    """A quantity with its 95% interval, over n independent observations."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def proportion(successes: int, n: int) -> Estimate:
    """How often something holds, of n independent observations: `rate` of so many ones and zeros.

    Raises ValueError for n = 0 and for successes outside of 0 to n.
    """
    if not (0 <= successes <= n and n > 0):
        raise ValueError(f"{successes} of {n} observations is no proportion")
    return _estimate(successes / n, n, squares=successes * (1 - successes / n), binary=True)


def rate(scores: np.ndarray) -> Estimate:
    """The mean of n independent scores [n] in [0, 1].

    With 100 scores or more and a mean from .2 to .8 the interval is Wilson's (1927), of as many observations of 0 and 1
    as would tell as much: scores that vary less than 0 and 1 do, such as ties and means over several samples, count
    for more than one each (the effective sample size of Kish 1965). One score of 0 and one of 1 more are reckoned with
    there, so that scores that are all alike are not taken for certain.

    Wilson's interval, and the bootstrap's, hold too seldom what they are about where scores are few or the mean is near
    0 or 1. With less than 100 scores, and below .1 and above .9, the interval is wide enough for sure: exact where all
    scores are 0 or 1 (Clopper and Pearson 1934), and otherwise what Hoeffding's bound (1963, theorem 1) leaves, which
    holds for any scores in [0, 1]. In between, its end towards 0 or 1 is.

    Raises ValueError without scores, and on scores outside of [0, 1].
    """
    n = len(scores)
    if n == 0:
        raise ValueError("an estimate needs at least one observation")
    if not (np.min(scores) >= 0.0 and np.max(scores) <= 1.0):
        raise ValueError(f"scores from {np.min(scores)} to {np.max(scores)} are not within 0 and 1")
    mean = float(np.mean(scores))
    binary = bool(np.all((scores == 0.0) | (scores == 1.0)))
    return _estimate(mean, n, squares=float(np.sum((scores - mean) ** 2)), binary=binary)


def _estimate(mean: float, n: int, *, squares: float, binary: bool) -> Estimate:
    """Args: squares: the sum of the squared differences from the mean; binary: all scores are 0 or 1."""
    low, high = _clopper_pearson(round(mean * n), n) if binary else _hoeffding(mean, n)
    if n >= _NEEDED:
        variance = (squares + 0.5) / n
        wilson = _wilson(mean, n * max(1.0, mean * (1 - mean) / variance))
        low = wilson[0] if _NEAR <= mean <= 1 - _NEARER else low
        high = wilson[1] if _NEARER <= mean <= 1 - _NEAR else high
    return Estimate(mean, low, high, n)


def _wilson(mean: float, n: float) -> tuple[float, float]:
    z2 = _Z95**2
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _clopper_pearson(successes: int, n: int) -> tuple[float, float]:
    """All rates under which neither so many nor so few successes have a chance below 2.5%."""
    # That k or more of n succeed has the chance I_p(k, n - k + 1).
    low, high = 0.0, 1.0
    if successes > 0:
        low = _crossing(lambda p: _beta(successes, n - successes + 1, p) - _ALPHA / 2)
    if successes < n:
        high = _crossing(lambda p: _beta(successes + 1, n - successes, p) - (1 - _ALPHA / 2))
    return low, high


def _beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):  # there it converges slowly
        return 1 - _beta(b, a, 1 - x)
    factor = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    fraction = numerator = 1.0  # 1 + d1/(1 + d2/(1 + …)), by Lentz's method
    denominator, change, m = 0.0, math.inf, 0
    while abs(change - 1) > 1e-14:
        m += 1
        half = m // 2
        if m % 2:
            d = -(a + half) * (a + b + half) * x / ((a + m - 1) * (a + m))
        else:
            d = half * (b - half) * x / ((a + m - 1) * (a + m))
        denominator = 1 / (1 + d * denominator)
        numerator = 1 + d / numerator
        change = numerator * denominator
        fraction *= change
    return factor / fraction


def _hoeffding(mean: float, n: int) -> tuple[float, float]:
    """All means under which the observed one has a bound on its chance of 2.5% or more, on its side."""
    limit = math.log(2 / _ALPHA) / n

    def divergence(p: float) -> float:
        zero = 0.0 if mean == 0.0 else mean * math.log(mean / p)
        return zero + (0.0 if mean == 1.0 else (1 - mean) * math.log((1 - mean) / (1 - p)))

    low = 0.0 if mean == 0.0 else _crossing(lambda p: limit - divergence(p), 0.0, mean)
    high = 1.0 if mean == 1.0 else _crossing(lambda p: divergence(p) - limit, mean, 1.0)
    return low, high


def _crossing(of: Callable[[float], float], low: float = 0.0, high: float = 1.0) -> float:
    """Where a rising function crosses 0, between two ends, at neither of which it is called."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if of(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, *, seed: int = 0) -> Estimate:
    """A statistic of n independent observations, with the percentile interval of Efron's bootstrap (1979).

    For what has no interval of its own: means of unbounded quantities, ratios, fits. 100 observations or more make it
    trustworthy.

    Args:
        statistic: of the observations at some indices [n], each as often as it is named there. Draws on which it is not
            finite are left out.

    Raises ValueError for n = 0, and where no draw has a finite value.
    """
    if n <= 0:
        raise ValueError("an estimate needs at least one observation")
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(n, size=n)) for _ in range(_DRAWS)])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) == 0:
        raise ValueError("the statistic is finite on no draw of the observations")
    low, high = np.quantile(drawn, [_ALPHA / 2, 1 - _ALPHA / 2])
    return Estimate(float(statistic(np.arange(n))), float(low), float(high), n)


Verdict = Literal["better", "worse", "cannot tell"]


def verdict(found: Estimate, equal: float) -> Verdict:
    """The two-sided test at 5% of a quantity, larger being better, against the value that two equals have."""
    if found.low > equal:
        return "better"
    return "worse" if found.high < equal else "cannot tell"


def quantiles(values: np.ndarray) -> dict[str, float]:
    """p50, p90, p99 and max of a sample that is not empty."""
    p50, p90, p99, top = np.quantile(values, [0.5, 0.9, 0.99, 1.0])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(top)}
