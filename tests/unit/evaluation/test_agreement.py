"""How far two engines are apart, by hand."""

from __future__ import annotations

import pytest

from dpo_ray.evaluation.agreement import calibration


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
