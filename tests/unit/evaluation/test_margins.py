"""Accuracy and win rate by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_ray.estimates import wilson
from dpo_ray.evaluation.agreement import margin_noise
from dpo_ray.evaluation.margins import preference_accuracy, win_rate


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
