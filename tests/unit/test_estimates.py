"""Proportions with their intervals, and quantiles, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.estimates import quantiles, wilson

Z = 1.959963984540054


def test_wilson_of_one_half_by_hand():
    # z² = 3.841459. n = 10, p = .5: the centre is .5, and half the width is
    # z·sqrt(.25/10 + z²/400) / (1 + z²/10) = 1.959964·sqrt(.0346036) / 1.3841459 = .263407.
    estimate = wilson(0.5, 10)
    assert (estimate.value, estimate.n) == (0.5, 10)
    assert (estimate.low, estimate.high) == pytest.approx((0.236593, 0.763407), abs=5e-7)


def test_wilson_at_the_ends_by_hand():
    # p = 1: the interval is [n / (n + z²), 1]; p = 0 mirrors it.
    assert wilson(1.0, 20).low == pytest.approx(20 / (20 + Z**2), abs=1e-12)
    assert wilson(1.0, 20).high == pytest.approx(1.0, abs=1e-12)
    assert wilson(0.0, 20).high == pytest.approx(Z**2 / (20 + Z**2), abs=1e-12)
    assert wilson(0.0, 20).low == pytest.approx(0.0, abs=1e-12)


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_an_interval_holds_its_value_and_stays_within_zero_and_one(value: float, n: int):
    estimate = wilson(value, n)
    assert 0 <= estimate.low <= value + 1e-12 and value - 1e-12 <= estimate.high <= 1


def test_more_observations_make_a_narrower_interval():
    widths = [wilson(0.7, n).high - wilson(0.7, n).low for n in (5, 50, 500)]
    assert widths == sorted(widths, reverse=True)


def test_an_interval_over_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        wilson(0.5, 0)


def test_an_estimate_prints_and_serialises():
    estimate = wilson(0.5, 10)
    assert str(estimate) == "0.500 [0.237, 0.763] (n=10)"
    assert estimate.as_dict() == {"value": 0.5, "low": estimate.low, "high": estimate.high, "n": 10}


def test_quantiles_by_hand():
    # 0..100: the q-th quantile is 100·q.
    assert quantiles(np.arange(101)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
