"""How far the tuned model has gone from the base model, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_ray.estimates import proportion, rate
from dpo_ray.evaluation.drift import Answers, accuracy_by_length, chosen_change, kl_per_token, samples_drift


def test_samples_are_described_for_both_models():
    base = [
        Answers(["It is so.", "I cannot say."], [4, 6], [True, True]),
        Answers(["a b a b a b", ""], [9, 1], [False, True]),
    ]
    tuned = [Answers(["Yes.", "No."], [2, 2], [True, True]), Answers(["It is.", "So."], [3, 3], [True, True])]
    found = samples_drift(base, tuned)
    assert found["length_ratio"]["value"] == pytest.approx(0.5)  # 10 of 20 tokens
    assert found["length_ratio"]["low"] == pytest.approx(0.4) and found["length_ratio"]["high"] == pytest.approx(0.6)
    assert (found["base"]["tokens"], found["tuned"]["tokens"]) == (5.0, 2.5)
    assert found["base"]["refusals"] == rate(np.array([0.5, 0.0])).as_dict()
    assert found["base"]["empty"] == rate(np.array([0.0, 0.5])).as_dict()
    assert found["base"]["truncated"] == rate(np.array([0.0, 0.5])).as_dict()
    # Of aba bab aba bab two of four stood before; the other answer has none.
    assert found["base"]["repetition"] == rate(np.array([0.0, 0.25])).as_dict()
    assert found["tuned"]["distinct_1"] == 1.0
    assert found["base"]["distinct_2"] == pytest.approx(6 / 9)


def test_a_base_model_that_says_nothing_has_no_ratio():
    silent, talks = [Answers([""], [0], [True])], [Answers(["a"], [1], [True])]
    assert samples_drift(silent, talks)["length_ratio"] is None


def test_the_kl_is_over_tokens_and_not_over_prompts():
    found = kl_per_token(np.array([1.0, 9.0]), np.array([10, 10]))
    assert (found.value, found.low, found.high, found.n) == (pytest.approx(0.5), 0.1, 0.9, 2)
    assert kl_per_token(np.array([1.0, 0.0]), np.array([10, 90])).value == pytest.approx(0.01)


def test_the_change_of_chosen_answers_is_paired():
    found = chosen_change(np.array([-12.0, -21.0]), np.array([-10.0, -20.0]))
    assert (found["before"], found["after"]) == (-15.0, -16.5)
    change = found["change"]
    assert (change["value"], change["low"], change["high"]) == (-1.5, -2.0, -1.0)


def test_accuracy_is_told_by_who_is_longer_and_by_thirds():
    margins = np.array([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    chosen, rejected = np.array([5, 6, 1, 2, 3, 50]), np.array([1, 1, 3, 9, 3, 50])
    found = accuracy_by_length(margins, chosen, rejected)
    assert found["chosen longer"] == proportion(1, 2).as_dict()
    assert found["chosen shorter"] == proportion(2, 2).as_dict()
    assert found["as long"] == proportion(1, 2).as_dict()
    # Tokens of both: 6 7 4 11 6 100; the thirds end at 6 and at 8.33.
    assert found["up to 6 tokens"] == proportion(2, 3).as_dict()
    assert found["6 to 8 tokens"] == proportion(0, 1).as_dict()
    assert found["over 8 tokens"] == proportion(2, 2).as_dict()
