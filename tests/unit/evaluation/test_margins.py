"""Accuracy, win rate and calibration by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.estimates import quantiles, wilson
from dpo_ray.evaluation.agreement import calibration, margin_noise
from dpo_ray.evaluation.margins import preference_accuracy, win_rate

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


def test_accuracy_is_the_share_of_positive_margins():
    estimate = preference_accuracy(np.array([1.0, 0.5, -2.0, 1e-9]))
    assert estimate == wilson(0.75, 4)


def test_a_margin_of_zero_among_others_is_no_preference_for_chosen():
    assert preference_accuracy(np.array([0.0, 1.0])) == wilson(0.5, 2)


@pytest.mark.parametrize("margins", [[], [0.0], [0.0, 0.0, -0.0]])
def test_a_policy_that_prefers_nothing_has_no_accuracy(margins: list[float]):
    assert preference_accuracy(np.array(margins)) is None


def test_margins_within_the_noise_of_the_engines_are_no_preference():
    # Each of the two answers may be off by .25 nats, so a margin by .5.
    metrics = {"sequence": {"max": 0.25}, "token": {"max": 0.01}}
    noise = margin_noise(metrics)
    assert noise == 0.5
    assert margin_noise(metrics, per_token=True) == 0.02
    assert preference_accuracy(np.array([0.5, -0.5, 0.1]), noise) is None
    # One margin beyond it is a policy that prefers something; then every pair counts.
    assert preference_accuracy(np.array([0.5, -0.6, 0.1]), noise) == wilson(2 / 3, 3)


def test_the_win_rate_counts_each_prompt_once_and_ties_one_half():
    # Prompt 1: (2 > 1), (2 > 3) no, (2 = 2) half: 1.5/3. Prompt 2: 1/1. Mean .75 over 2 prompts.
    assert win_rate([[2.0], [5.0]], [[1.0, 3.0, 2.0], [4.0]]) == wilson(0.75, 2)


def test_equal_models_win_half_the_time():
    scores = [[0.1, 0.9, 0.5], [1.0], [0.3, 0.3]]
    assert win_rate(scores, scores) == wilson(0.5, 3)


def test_swapping_the_models_mirrors_the_win_rate():
    tuned, base = [[0.1, 0.9], [0.4]], [[0.2, 0.3], [0.4]]
    one, other = win_rate(tuned, base), win_rate(base, tuned)
    assert one is not None and other is not None
    assert one.value + other.value == pytest.approx(1.0, abs=1e-12)


def test_without_prompts_there_is_no_win_rate():
    assert win_rate([], []) is None


def test_prompts_must_match():
    with pytest.raises(ValueError, match="zip"):
        win_rate([[1.0]], [])


def test_quantiles_by_hand():
    # 0..100: the q-th quantile is 100·q.
    assert quantiles(np.arange(101)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}


def test_calibration_by_hand():
    # Δ: (.1, -.3) and (.2): |Δ| per token .1, .2, .3; per sequence |-.2| and |.2|; bias (.1 - .3 + .2) / 3 = 0.
    result = calibration([[-1.0, -2.0], [-3.0]], [[-1.1, -1.7], [-3.2]])
    assert result["token"]["p50"] == pytest.approx(0.2, abs=1e-12)
    assert result["token"]["max"] == pytest.approx(0.3, abs=1e-12)
    assert result["sequence"] == pytest.approx({"p50": 0.2, "p90": 0.2, "p99": 0.2, "max": 0.2}, abs=1e-12)
    assert result["bias_per_token"] == pytest.approx(0.0, abs=1e-12)
    assert (result["num_sequences"], result["num_tokens"]) == (2, 3)


def test_a_small_bias_of_every_token_shows_in_the_sequences():
    long = [[-1.0] * 100]
    result = calibration(long, [[-1.001] * 100])
    assert result["bias_per_token"] == pytest.approx(0.001, abs=1e-12)
    assert result["sequence"]["max"] == pytest.approx(0.1, abs=1e-10)


@pytest.mark.parametrize(
    ("scored", "rescored"),
    [([[-1.0]], []), ([[-1.0, -2.0, -3.0]], [[-1.0, -2.0]]), ([[-1.0, -2.0]], [[-1.0]]), ([[]], [[-1.0]])],
)
def test_scores_of_other_lengths_are_never_compared(scored: list[list[float]], rescored: list[list[float]]):
    # A completion of a single token would otherwise be broadcast against any other.
    with pytest.raises(ValueError):
        calibration([[-1.0], *scored], [[-1.0], *rescored])
