"""Which evaluation was best, and when to stop, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config import EarlyStopping, Metric
from dpo_ray.training.selection import best_step, higher_is_better, should_stop


def history(metric: Metric, values: list[float | None]) -> list[dict[str, Any]]:
    """Steps 1, 2, …; None where there was no evaluation."""
    return [{"step": i + 1, "loss": 0.1} | ({} if v is None else {metric: v}) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("eval_loss", [None, 0.7, None, 0.5, None, 0.6], 4),
        ("eval_rewards/accuracies", [None, 0.7, None, 0.5, None, 0.6], 2),
        ("eval_rewards/margins", [-2.0, -1.0, -3.0], 2),
        ("eval_loss", [0.6, 0.5, 0.5], 3),  # the later of equals: the one that Ray keeps
        ("eval_rewards/accuracies", [0.5, 1.0, 1.0], 3),
        ("eval_loss", [None, None], None),
        ("eval_loss", [], None),
    ],
)
def test_the_best_step(metric: Metric, values: list[float | None], best: int | None):
    assert best_step(history(metric, values), metric) == best


def test_the_best_step_goes_by_its_own_metric_alone():
    rows = [{"step": 3, "eval_loss": 0.1}, {"step": 6, "eval_loss": 0.9, "eval_rewards/margins": 0.2}]
    assert best_step(rows, "eval_loss") == 3
    assert best_step(rows, "eval_rewards/margins") == 6


def test_the_best_step_is_one_whose_checkpoint_is_still_there():
    rows = history("eval_loss", [0.5, 0.1, 0.3])
    assert best_step(rows, "eval_loss", among={1, 3}) == 3
    assert best_step(rows, "eval_loss", among=set()) is None


def test_only_a_loss_is_to_fall():
    assert not higher_is_better("eval_loss")
    assert higher_is_better("eval_rewards/accuracies") and higher_is_better("eval_rewards/margins")


@pytest.mark.parametrize(
    ("metric", "values", "patience", "least", "stops"),
    [
        ("eval_loss", [], 1, 0.0, False),
        ("eval_loss", [0.7], 1, 0.0, False),
        ("eval_loss", [0.7, 0.7], 1, 0.0, True),  # no improvement is none
        ("eval_loss", [0.7, 0.6, 0.65], 2, 0.0, False),
        ("eval_loss", [0.7, 0.6, 0.65, 0.61], 2, 0.0, True),
        ("eval_loss", [0.7, 0.6, 0.65, 0.59], 2, 0.0, False),
        ("eval_loss", [0.7, None, 0.6, None, None, 0.65, None], 2, 0.0, False),  # only evaluations are counted
        ("eval_rewards/accuracies", [0.5, 0.6, 0.7], 1, 0.0, False),
        ("eval_rewards/accuracies", [0.5, 0.6, 0.6, 0.55], 2, 0.0, True),
        ("eval_loss", [0.7, 0.65, 0.62], 2, 0.1, True),  # each less than 0.1 below 0.7
        ("eval_loss", [0.7, 0.65, 0.59], 2, 0.1, False),  # small steps add up
        ("eval_loss", [0.7, 0.8, 0.8, 0.5], 2, 0.0, False),  # what came last decides
    ],
)
def test_training_stops_after_so_many_evaluations_without_an_improvement(
    metric: Metric, values: list[float | None], patience: int, least: float, stops: bool
):
    options = EarlyStopping(metric=metric, patience=patience, min_improvement=least)
    assert should_stop(history(metric, values), options) is stops
