"""The gate: by the ends of intervals, each condition by its name."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import Gate
from dpo_ray.evaluation.gate import failed_conditions


def estimate(low: float, value: float, high: float) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": 40}


METRICS = {
    "accuracy": estimate(0.55, 0.7, 0.8),
    "win_rate": estimate(0.45, 0.6, 0.7),
    "length_controlled_win_rate": estimate(0.52, 0.6, 0.7),
    "kl_per_token": estimate(0.01, 0.02, 0.03),
    "chosen_logps": {"before": -20.0, "after": -22.0, "change": estimate(-2.5, -2.0, -1.5)},
    "drift": {"length_ratio": estimate(0.9, 1.1, 1.3)},
    "sets": {
        "bench": {"version": "v1", "change": estimate(-0.03, 0.0, 0.03)},
        "first": {"version": None},
        "undefined": {"version": "v1"},
    },
}


@pytest.mark.parametrize(
    ("gate", "refused"),
    [
        ({"accuracy_above": 0.5}, False),
        ({"length_controlled_win_rate_above": 0.5}, True),
        ({"kl_below": 1.0}, True),
        ({"chosen_drop_below": 9.0}, True),
        ({"length_ratio_within": [0.1, 9.0]}, True),
        ({"no_regression": {"bench": 0.5}}, True),
    ],
)
def test_an_interval_of_the_bootstraps_needs_thirty_observations(gate: dict[str, Any], refused: bool):
    def of(n: int) -> Any:
        def counted(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            return {key: n if key == "n" else counted(one) for key, one in value.items()}

        return counted(METRICS)

    given = Gate(**{"accuracy_above": None, **gate})
    assert failed_conditions(given, of(30)) == []
    reasons = failed_conditions(given, of(29))
    assert bool(reasons) == refused
    assert all("29 observations" in reason and "below 30: hold out more prompts" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("gate", "failed"),
    [
        ({}, None),
        ({"accuracy_above": 0.54}, None),
        ({"accuracy_above": 0.55}, r"accuracy is 0.700 with a 95% interval from 0.550 to 0.800 (n=40), and "
         "publish.gate.accuracy_above asks for above 0.55"),
        ({"accuracy_above": None}, None),
        ({"win_rate_above": 0.5}, "win_rate is 0.600"),
        ({"length_controlled_win_rate_above": 0.5}, None),
        ({"kl_below": 0.031}, None),
        ({"kl_below": 0.03}, "kl_per_token is 0.020 with a 95% interval from 0.010 to 0.030 (n=40), and "
         "publish.gate.kl_below asks for below 0.03"),
        ({"chosen_drop_below": 2.6}, None),
        ({"chosen_drop_below": 2.5}, "the fall of chosen answers' log-probs is 2.000 with a 95% interval from 1.500 to "
         "2.500"),
        ({"length_ratio_within": [0.8, 1.4]}, None),
        ({"length_ratio_within": [0.9, 1.4]}, "length_ratio is 1.100 with a 95% interval from 0.900 to 1.300 "
         "(n=40), and publish.gate.length_ratio_within asks for above 0.9 and below 1.4"),
        ({"length_ratio_within": [0.8, 1.2]}, "asks for above 0.8 and below 1.2"),
        ({"no_regression": {"bench": 0.031, "first": 0.01}}, None),
        ({"no_regression": {"bench": 0.03}}, "the change of accuracy on bench from the published version v1 is 0.000 "
         "with a 95% interval from -0.030 to 0.030 (n=40), and publish.gate.no_regression.bench asks for above -0.03"),
        ({"no_regression": {"undefined": 0.5}}, "the change of accuracy on undefined from the published version v1 is "
         "undefined (the published model is this run's reference, or there is no pair: name a model.path that both "),
        ({"no_regression": {"other": 0.5}}, "the change of accuracy on other"),
    ],
)  # fmt: skip
def test_a_condition_holds_where_the_whole_interval_does(gate: dict[str, Any], failed: str | None):
    found = failed_conditions(Gate(**gate), METRICS)
    assert len(found) == (failed is not None)
    assert failed is None or failed in found[0]


def test_what_was_not_measured_fails_what_asks_for_it():
    gate = Gate(win_rate_above=0.5, kl_below=1.0, chosen_drop_below=1.0, length_ratio_within=(0.5, 2.0))
    found = failed_conditions(gate, {"accuracy": None, "win_rate": None})
    assert [said.split(" is undefined, and publish.gate.")[1].split(" asks")[0] for said in found] == [
        "accuracy_above", "win_rate_above", "kl_below", "chosen_drop_below", "length_ratio_within",
    ]  # fmt: skip


def test_every_condition_that_fails_is_named():
    gate = Gate(accuracy_above=0.9, win_rate_above=0.9)
    assert len(failed_conditions(gate, METRICS)) == 2


def test_every_option_of_the_gate_is_a_condition():
    strict = {
        "accuracy_above": 0.99, "win_rate_above": 0.99, "length_controlled_win_rate_above": 0.99, "kl_below": 1e-6,
        "chosen_drop_below": 1e-6, "length_ratio_within": (1.0, 1.01), "no_regression": {"bench": 0.01},
    }  # fmt: skip
    assert set(strict) == set(Gate.model_fields)
    assert len(failed_conditions(Gate(**strict), METRICS)) == len(strict)
