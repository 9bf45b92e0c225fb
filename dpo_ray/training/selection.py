"""What held-out metrics decide while training: which step was best, and when to stop."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dpo_ray.config import EarlyStopping, Metric


def best_step(history: list[dict[str, Any]], metric: Metric, among: Collection[int] | None = None) -> int | None:
    """The step whose evaluation was best, the later one of equals; None before the first evaluation.

    Args:
        among: the steps that may be chosen, where not all can be.
    """
    evaluated = [m for m in history if metric in m and (among is None or m["step"] in among)]
    if not evaluated:
        return None
    return int(min(evaluated, key=lambda m: (_cost(m, metric), -m["step"]))["step"])


def should_stop(history: list[dict[str, Any]], options: EarlyStopping) -> bool:
    """Whether the last `patience` evaluations brought no improvement over the best one before them."""
    best = float("inf")
    waited = 0
    for cost in (_cost(m, options.metric) for m in history if options.metric in m):
        if cost < best - options.min_improvement:
            best, waited = cost, 0
        else:
            waited += 1
    return waited >= options.patience


def higher_is_better(metric: Metric) -> bool:
    """A loss is to fall, accuracies and margins are to rise."""
    return metric != "eval_loss"


def _cost(metrics: dict[str, Any], metric: Metric) -> float:
    value = float(metrics[metric])
    return -value if higher_is_better(metric) else value
