"""What compares trials, and when two are told apart."""

from __future__ import annotations

import math

import pytest

from tuning.measures import distinguishable, measured, pareto_front, score

METRICS = {
    "eval_loss": 0.5,
    "eval_rewards/accuracies": 0.8,
    "eval_pairs": 100.0,
    "eval_margins": 2.0,
    "eval_margins_se": 0.5,
    "eval_logps/chosen": -40.0,
    "eval_logps/chosen_se": 3.0,
    "eval_logratios/chosen": -1.5,
    "eval_logratios/chosen_se": 0.2,
}


def test_each_measure_has_its_value_and_its_interval():
    found = measured(METRICS)
    assert found["accuracy"]["value"] == 0.8
    assert found["accuracy"]["se"] == pytest.approx(math.sqrt(0.8 * 0.2 / 100))
    assert found["accuracy"]["low"] == pytest.approx(0.711, abs=1e-3)  # Wilson's, of 80 in 100
    assert found["accuracy"]["high"] == pytest.approx(0.867, abs=1e-3)
    assert found["margin"] == {"value": 2.0, "se": 0.5, "low": pytest.approx(1.02), "high": pytest.approx(2.98)}
    # The chosen answers' log-ratio to the reference is −1.5: they have become 1.5 nats less likely.
    assert found["likelihood_drop"]["value"] == 1.5
    assert found["chosen_logps"]["value"] == -40.0


def test_a_loss_without_a_reference_has_no_likelihood_drop():
    without = {name: value for name, value in METRICS.items() if "logratios" not in name}
    assert "likelihood_drop" not in measured(without)


def test_an_accuracy_of_one_is_not_taken_for_certain():
    assert measured({**METRICS, "eval_rewards/accuracies": 1.0})["accuracy"]["se"] == pytest.approx(0.01)


def test_each_measure_counts_in_its_own_direction_by_its_weight():
    found = measured(METRICS)
    assert score({"accuracy": 1.0}, found) == (0.8, pytest.approx(0.04))
    assert score({"likelihood_drop": 1.0}, found) == (-1.5, 0.2)
    value, error = score({"accuracy": 1.0, "likelihood_drop": 0.1}, found)
    assert value == pytest.approx(0.8 - 0.15)
    assert error == pytest.approx(0.04 + 0.02)
    assert score({"accuracy": 1.0}, {}) is None


def test_two_scores_are_told_apart_where_their_difference_is_beyond_chance():
    assert not distinguishable((0.80, 0.04), (0.85, 0.04))
    assert distinguishable((0.70, 0.04), (0.85, 0.04))
    assert not distinguishable((0.7, 0.0), (0.7, 0.0))


def test_the_front_is_what_nothing_is_better_than_in_all():
    assert pareto_front([(1, 5), (2, 4), (3, 1), (2, 3), (0, 0), (1, 5)]) == [0, 1, 2, 5]
    assert pareto_front([]) == []
