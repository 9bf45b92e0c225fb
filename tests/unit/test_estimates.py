"""Rates with their intervals, the bootstrap and quantiles, by hand; how often they hold is in benchmarks/intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.estimates import Estimate, bootstrap, proportion, quantiles, rate, verdict

Z = 1.959963984540054


def interval(estimate: Estimate) -> tuple[float, float]:
    return estimate.low, estimate.high


def test_a_hundred_in_the_middle_have_wilsons_interval_by_hand():
    # z² = 3.841459. n = 100, p = .5, of a variance (25 + .5)/100 = .255, so no more than 100 observations: the centre
    # is .5, and half the width is z·sqrt(.25/100 + z²/40000) / (1 + z²/100) = .0961684.
    found = proportion(50, 100)
    assert (found.value, found.n) == (0.5, 100)
    assert interval(found) == pytest.approx((0.403832, 0.596168), abs=5e-7)


def test_scores_that_vary_less_count_for_more_observations():
    # 50 ties, 25 wins and 25 losses: squares 50·.25 = 12.5, variance (12.5 + .5)/100 = .13, so .25/.13·100 = 192.3077
    # observations: half the width is z·sqrt(.25/192.3077 + z²/(4·192.3077²)) / (1 + z²/192.3077) = .0699721.
    found = rate(np.repeat([0.5, 0.0, 1.0], [50, 25, 25]))
    assert interval(found) == pytest.approx((0.430028, 0.569972), abs=5e-7)


def test_scores_that_are_all_alike_are_not_taken_for_certain():
    # Variance .5/100 = .005: as good as 5000 observations.
    assert interval(rate(np.full(100, 0.5))) == pytest.approx((0.486146, 0.513854), abs=5e-7)


def test_few_observations_have_clopper_and_pearsons_interval():
    # Of 0 and of all, the ends solve p^n = .025; of 1 in 10 see Clopper and Pearson's tables: .0025 to .4450.
    assert interval(proportion(0, 20)) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)), abs=1e-12)
    assert interval(proportion(20, 20)) == pytest.approx((0.025 ** (1 / 20), 1.0), abs=1e-12)
    assert interval(proportion(1, 10)) == pytest.approx((0.002529, 0.445016), abs=5e-7)


@pytest.mark.parametrize(("successes", "n"), [(3, 30), (1, 150), (149, 150), (17, 20), (40, 1000), (5, 100_000)])
def test_clopper_and_pearsons_ends_are_where_the_tails_have_their_chance(successes: int, n: int):
    def tail(of: range, p: float) -> float:
        return math.fsum(
            math.exp(
                math.lgamma(n + 1)
                - math.lgamma(k + 1)
                - math.lgamma(n - k + 1)
                + k * math.log(p)
                + (n - k) * math.log1p(-p)
            )
            for k in of
        )

    found = proportion(successes, n)
    below = range(successes) if successes < n / 2 else range(successes, n + 1)
    chance = tail(below, found.low)
    assert (1 - chance if successes < n / 2 else chance) == pytest.approx(0.025, abs=1e-8)
    above = range(successes + 1) if successes < n / 2 else range(successes + 1, n + 1)
    chance = tail(above, found.high)
    assert (chance if successes < n / 2 else 1 - chance) == pytest.approx(0.025, abs=1e-8)


def test_few_scores_between_zero_and_one_have_hoeffdings_interval():
    # n = 30, mean .75: at both ends 30 · KL(.75 | p) is ln 40.
    found = rate(np.array([1.0, 0.5] * 15))
    for p in interval(found):
        assert 30 * (0.75 * math.log(0.75 / p) + 0.25 * math.log(0.25 / (1 - p))) == pytest.approx(math.log(40))
    assert found.low < 0.75 < found.high


def test_a_huge_count_takes_no_memory():
    found = proportion(9 * 10**11, 10**12)
    assert 0.899999 < found.low < 0.9 < found.high < 0.900001


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=150))
def test_an_interval_holds_its_value_and_stays_within_zero_and_one(scores: list[float]):
    found = rate(np.array(scores))
    assert 0 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=150))
def test_the_other_sides_interval_is_the_mirror(scores: list[float]):
    one, other = rate(np.array(scores)), rate(1 - np.array(scores))
    assert interval(one) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-9)


@given(st.integers(1, 300), st.data())
def test_a_proportion_is_the_rate_of_ones_and_zeros(n: int, data: st.DataObject):
    successes = data.draw(st.integers(0, n))
    one, other = proportion(successes, n), rate(np.repeat([1.0, 0.0], [successes, n - successes]))
    assert (*interval(one), one.value) == pytest.approx((*interval(other), other.value), abs=1e-9)


def test_more_observations_make_a_narrower_interval():
    widths = [proportion(7 * n, 10 * n) for n in (1, 5, 50, 500)]
    assert [e.high - e.low for e in widths] == sorted((e.high - e.low for e in widths), reverse=True)


def test_an_interval_over_nothing_or_of_no_shares_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        rate(np.array([]))
    with pytest.raises(ValueError, match="0 of 0"):
        proportion(0, 0)
    with pytest.raises(ValueError, match="11 of 10"):
        proportion(11, 10)
    with pytest.raises(ValueError, match="not within 0 and 1"):
        rate(np.array([0.5, 1.5]))
    with pytest.raises(ValueError, match="not within 0 and 1"):
        rate(np.array([0.5, math.nan]))
    with pytest.raises(ValueError, match="at least one"):
        bootstrap(lambda of: 0.0, 0)


def test_the_bootstraps_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap(lambda of: float(np.mean(values[of])), len(values))
    error = float(np.std(values)) / 20
    assert found.value == pytest.approx(float(np.mean(values)))
    assert interval(found) == pytest.approx((found.value - Z * error, found.value + Z * error), abs=0.03)


def test_the_bootstrap_is_the_same_each_time_and_leaves_out_what_is_not_finite():
    values = np.array([1.0, 2.0, math.nan, 4.0] * 5)
    one, other = (bootstrap(lambda of: float(np.nanmax(values[of])), 20) for _ in range(2))
    assert one == other
    ratio = bootstrap(lambda of: 1.0 if 0 in of else math.inf, 3)
    assert (ratio.low, ratio.high) == (1.0, 1.0)
    with pytest.raises(ValueError, match="finite on no draw"):
        bootstrap(lambda of: math.nan, 3)


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.51, 0.7, "better"), (0.3, 0.49, "worse"), (0.5, 0.7, "cannot tell")]
)
def test_a_verdict_is_by_the_interval(low: float, high: float, said: str):
    assert verdict(Estimate(0.5, low, high, 10), 0.5) == said


def test_an_estimate_prints_and_serialises():
    found = proportion(50, 100)
    assert str(found) == "0.500 [0.404, 0.596] (n=100)"
    assert found.as_dict() == {"value": 0.5, "low": found.low, "high": found.high, "n": 100}


def test_quantiles_by_hand():
    # 0..100: the q-th quantile is 100·q.
    assert quantiles(np.arange(101)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
