"""Accuracy and wins by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_ray.estimates import proportion
from dpo_ray.evaluation.agreement import Noise
from dpo_ray.evaluation.margins import accuracy_by_source, mean_wins, preference_accuracy, win_shares


def test_accuracy_is_the_share_of_positive_margins():
    estimate = preference_accuracy(np.array([1.0, 0.5, -2.0, 1e-9]))
    assert estimate == proportion(3, 4)


def test_a_margin_of_zero_among_others_is_no_preference_for_chosen():
    assert preference_accuracy(np.array([0.0, 1.0])) == proportion(1, 2)


@pytest.mark.parametrize("margins", [[], [0.0], [0.0, 0.0, -0.0]])
def test_a_policy_that_prefers_nothing_has_no_accuracy(margins: list[float]):
    assert preference_accuracy(np.array(margins)) is None


def test_margins_within_the_noise_of_the_engines_are_no_preference():
    noise = Noise(margin=0.5)
    assert preference_accuracy(np.array([0.5, -0.5, 0.1]), noise) is None
    # One margin beyond it is a policy that prefers something; then every pair counts.
    assert preference_accuracy(np.array([0.5, -0.6, 0.1]), noise) == proportion(2, 3)


def test_a_preference_smaller_than_the_noise_of_one_pair_shows_over_many():
    # As in bfloat16: noise of .7 nats on each margin, and a policy that prefers the chosen answers by .2.
    noise, spread = Noise(margin=4.8), np.random.default_rng(0).normal(0, 0.7, 400)
    assert preference_accuracy(spread, noise) is None
    found = preference_accuracy(spread + 0.2, noise)
    assert found is not None and found.low > 0.5
    assert preference_accuracy(np.array([0.9, -0.7, 0.5, 0.1]), noise) is None  # mean .2 with an error of .34


def test_a_mean_that_a_bias_makes_of_longer_answers_is_no_preference():
    spread = np.random.default_rng(0).normal(0.1, 0.01, 400)
    assert preference_accuracy(spread, Noise(margin=0.5, mean=0.11)) is None
    assert preference_accuracy(spread, Noise(margin=0.5, mean=0.05)) == proportion(400, 400)


def test_accuracy_by_source_is_that_of_its_own_pairs():
    margins = np.array([1.0, -1.0, 2.0, 0.0, 3.0, 4.0])
    sources = np.array(["math", "chat", "chat", "code", None, "math"], dtype=object)
    assert accuracy_by_source(margins, sources) == {"chat": proportion(1, 2), "code": None, "math": proportion(2, 2)}
    assert accuracy_by_source(margins[:1], np.array([None], dtype=object)) == {}


def test_each_prompt_has_the_mean_of_its_pairings_ties_as_halves():
    # Prompt 1: (2 > 1), (2 > 3) no, (2 = 2) half: 1.5/3. Prompt 2: 1/1.
    assert win_shares([[2.0], [5.0]], [[1.0, 3.0, 2.0], [4.0]]).tolist() == [0.5, 1.0]


def test_equal_models_win_half_the_time():
    scores = [[0.1, 0.9, 0.5], [1.0], [0.3, 0.3]]
    assert win_shares(scores, scores).tolist() == [0.5] * 3


def test_swapping_the_models_mirrors_the_wins():
    tuned, base = [[0.1, 0.9], [0.4]], [[0.2, 0.3], [0.4]]
    assert (win_shares(tuned, base) + win_shares(base, tuned)).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_where_a_judge_compared_the_wins_are_what_it_said():
    assert mean_wins([[1.0, 0.5], [0.25, 0.25]]).tolist() == [0.75, 0.25]


def test_without_prompts_there_are_no_wins():
    assert len(win_shares([], [])) == len(mean_wins([])) == 0


def test_prompts_must_match():
    with pytest.raises(ValueError, match="zip"):
        win_shares([[1.0]], [])
