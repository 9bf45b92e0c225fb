"""How far two engines are apart, and whether they compute the same model, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dpo_ray.config.tolerance import Limits, Tolerance
from dpo_ray.errors import ReferenceMismatch
from dpo_ray.evaluation.agreement import (
    Noise,
    calibration,
    calibration_of,
    disagreement,
    is_finite,
    margin_noise,
    require_same_start,
)

LIMITS = Limits(bias_per_token=0.01, p99_per_token=0.1, worst_token=0.2)


def test_calibration_by_hand():
    # Δ: (.1, -.3) and (.2): |Δ| per token .1, .2, .3; per sequence |-.2| and |.2|; bias (.1 - .3 + .2) / 3 = 0.
    result = calibration([[-1.0, -2.0], [-3.0]], [[-1.1, -1.7], [-3.2]])
    assert result["token"]["p50"] == pytest.approx(0.2, abs=1e-12)
    assert result["token"]["max"] == pytest.approx(0.3, abs=1e-12)
    assert result["sequence"] == pytest.approx({"p50": 0.2, "p90": 0.2, "p99": 0.2, "max": 0.2}, abs=1e-12)
    # Their worst tokens are .3 and .2 off.
    assert result["worst_token"]["p50"] == pytest.approx(0.25, abs=1e-12)
    assert result["bias_per_token"] == pytest.approx(0.0, abs=1e-12)
    # √(2/1 · ((-.2)² + .2²)) / 3
    assert result["bias_standard_error"] == pytest.approx(0.4 / 3, abs=1e-12)
    assert (result["num_sequences"], result["num_tokens"]) == (2, 3)


def test_a_small_bias_of_every_token_shows_in_the_sequences():
    long = [[-1.0] * 100]
    result = calibration(long, [[-1.001] * 100])
    assert result["bias_per_token"] == pytest.approx(0.001, abs=1e-12)
    assert result["sequence"]["max"] == pytest.approx(0.1, abs=1e-10)


def test_the_error_of_the_bias_is_that_of_completions_and_not_of_tokens():
    # Each completion is off as a whole: two observations, whatever their length.
    short, long = (calibration_of([np.full(length, 0.1), np.full(length, -0.1)]) for length in (1, 100))
    assert long["bias_standard_error"] == pytest.approx(0.1, abs=1e-12)
    assert short["bias_standard_error"] == pytest.approx(0.1, abs=1e-12)
    # A bias that all tokens share is certain, whatever the lengths.
    assert calibration_of([np.full(3, 0.1), np.full(50, 0.1)])["bias_standard_error"] == pytest.approx(0, abs=1e-12)
    assert calibration_of([np.full(100, 0.1)])["bias_standard_error"] is None


def test_the_error_of_the_bias_is_its_spread_over_samples():
    # Completions of unequal lengths with noise of tokens and of completions: the estimate against simulation.
    random = np.random.default_rng(0)

    def sample() -> dict[str, Any]:
        lengths = random.integers(5, 100, size=64)
        return calibration_of([random.normal(0.02 * random.normal(), 0.05, n) for n in lengths])

    samples = [sample() for _ in range(400)]
    spread = float(np.std([s["bias_per_token"] for s in samples], ddof=1))
    told = float(np.mean([s["bias_standard_error"] for s in samples]))
    assert told == pytest.approx(spread, rel=0.15)  # 400 samples tell a spread to 4%


@pytest.mark.parametrize(
    ("scored", "rescored"),
    [([[-1.0]], []), ([[-1.0, -2.0, -3.0]], [[-1.0, -2.0]]), ([[-1.0, -2.0]], [[-1.0]]), ([[]], [[-1.0]])],
)
def test_scores_of_other_lengths_are_never_compared(scored: list[list[float]], rescored: list[list[float]]):
    # A completion of a single token would otherwise be broadcast against any other.
    with pytest.raises(ValueError):
        calibration([[-1.0], *scored], [[-1.0], *rescored])


def test_completions_without_a_token_do_not_count_as_agreeing():
    assert calibration([[], [-1.0]], [[], [-1.5]])["worst_token"]["p50"] == 0.5
    with pytest.raises(ValueError, match="no token"):
        calibration([[]], [[]])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_finite(wrong: float):
    for scored, rescored in (([wrong, -1.0], [-1.0, -1.0]), ([-1.0, -1.0], [-1.0, wrong]), ([wrong], [wrong])):
        assert not is_finite(calibration([scored, [-1.0]], [rescored, [-1.0]]))
    assert is_finite(calibration([[-1.0]], [[-2.0]]))


def noisy(spread: float, completions: int = 64, length: int = 50, seed: int = 0) -> list[np.ndarray]:
    """Δ of ±spread, each as often: no bias."""
    random = np.random.default_rng(seed)
    return [random.permutation(np.repeat([spread, -spread], length // 2)) for _ in range(completions)]


def test_noise_without_bias_passes_whatever_its_sum():
    long = calibration_of(noisy(0.09, length=5000))
    assert disagreement(long, LIMITS) is None
    random = np.random.default_rng(1)
    drawn = calibration_of([random.normal(0, 0.03, 2000) for _ in range(64)])
    assert drawn["sequence"]["max"] > 1.0  # far over what any limit on the sum of a completion could allow
    assert disagreement(drawn, LIMITS) is None


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda d: d + 0.011, "bias_per_token=0.01"),
        (lambda d: d - 0.011, "bias_per_token=0.01"),
        (lambda d: d * 3.5, "p99_per_token=0.1"),
        # One token of fifty, and so of each completion, the sign by turns: no bias, and below the 99th percentile.
        (lambda d: np.concatenate([d, np.zeros(200), [0.3 * np.sign(d[0])]]), "worst_token=0.2"),
    ],
    ids=["bias", "other bias", "spread", "one token"],
)
def test_each_limit_catches_what_the_others_let_pass(change: Any, names: str):
    assert disagreement(calibration_of(noisy(0.03)), LIMITS) is None
    found = disagreement(calibration_of([change(one) for one in noisy(0.03)]), LIMITS)
    assert found is not None and names in found and ";" not in found


def test_all_that_is_over_its_limit_is_told():
    found = disagreement(calibration_of([one + 5.0 for one in noisy(0.03)]), LIMITS)
    assert found is not None and [name in found for name in Tolerance.model_fields] == [True] * 3
    assert "+5.0e+00 ± " in found


def test_a_bias_that_noise_may_have_made_is_let_pass():
    # 16 completions, each off by ±.1 a token: their mean .0125 is half of its standard error .0258.
    of_completions = [np.full(10, 0.1 if n < 9 else -0.1) for n in range(16)]
    metrics = calibration_of(of_completions)
    assert metrics["bias_per_token"] == pytest.approx(0.0125)
    wide = Limits(bias_per_token=0.01, p99_per_token=1.0, worst_token=1.0)
    assert disagreement(metrics, wide) is None
    # As many times more of them, and it is certain.
    assert "bias_per_token" in str(disagreement(calibration_of([of_completions[0]] * 900 + of_completions), wide))


def test_of_one_completion_no_bias_is_known_and_the_rest_is():
    assert disagreement(calibration_of([np.full(100, 0.05)]), LIMITS) is None
    assert "p99_per_token" in str(disagreement(calibration_of([np.full(100, 0.15)]), LIMITS))


def test_a_first_step_of_another_model_is_refused_with_what_is_wrong():
    require_same_start(LIMITS, noisy(0.03))
    with pytest.raises(ReferenceMismatch, match=r"first step .* of 64 completions .*bias_per_token=0\.01.*wrong zero"):
        require_same_start(LIMITS, [one + 0.05 for one in noisy(0.03)])
    with pytest.raises(ReferenceMismatch, match="not finite"):
        require_same_start(LIMITS, [*noisy(0.03), np.array([math.nan])])


def test_the_noise_of_margins_by_hand():
    # Each of the two answers may be off by .25 nats, so a margin by .5; the bias by .001 + 2 · .002 on 40 more tokens.
    metrics = {
        "sequence": {"max": 0.25},
        "token": {"max": 0.01},
        "bias_per_token": -0.001,
        "bias_standard_error": 0.002,
    }
    found = margin_noise(metrics, -40)
    assert (found.margin, found.mean) == (0.5, pytest.approx(0.2))
    assert margin_noise(metrics, -40, per_token=True) == Noise(0.02, 0.0)
    assert margin_noise({**metrics, "bias_standard_error": None}, 10).mean == pytest.approx(0.01)
