"""The win rate at equal lengths."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_ray.evaluation.length_control import length_controlled_win_rate


def drawn(a: float, b: float, shift: float, n: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Comparisons whose wins follow the model itself, between answers that are longer by `shift` on average."""
    rng = np.random.default_rng(0)
    longer = rng.normal(shift, 1.0, n)
    x = np.tanh(longer / np.std(longer))
    wins = (rng.random(n) < 1 / (1 + np.exp(-a - b * x))).astype(float)
    base = rng.uniform(5, 10, n)
    return wins, base + longer, base


@pytest.mark.parametrize("b", [0.0, 2.0, -2.0])
def test_it_is_the_rate_of_a_model_whose_answers_are_no_longer(b: float):
    found = length_controlled_win_rate(*drawn(0.5, b, shift=1.0))
    expected = 1 / (1 + np.exp(-0.5))
    assert found.value == pytest.approx(expected, abs=0.03)
    assert found.low < expected < found.high


def test_equal_models_of_which_one_is_longer_win_half_the_time():
    wins, lengths, base = drawn(0.0, 2.0, shift=1.0)
    found = length_controlled_win_rate(wins, lengths, base)
    assert float(np.mean(wins)) > 0.65
    assert found.low < 0.5 < found.high


def test_swapping_the_models_mirrors_it():
    wins, lengths, base = drawn(0.5, 1.0, shift=0.5, n=200)
    one, other = length_controlled_win_rate(wins, lengths, base), length_controlled_win_rate(1 - wins, base, lengths)
    assert one.value + other.value == pytest.approx(1.0, abs=1e-9)


def test_comparisons_that_lengths_part_wholly_have_a_finite_fit():
    found = length_controlled_win_rate(np.array([1.0, 0.0] * 20), np.array([2.0, 1.0] * 20), np.array([1.0, 2.0] * 20))
    assert found.value == pytest.approx(0.5, abs=1e-6)


def test_equal_lengths_change_next_to_nothing_and_no_prompts_have_no_rate():
    ones = np.ones(50)
    found = length_controlled_win_rate(np.array([1.0] * 30 + [0.0] * 20), ones, ones)
    assert found.value == pytest.approx(0.6, abs=0.01)
