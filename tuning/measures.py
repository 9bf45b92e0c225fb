"""What trials are compared by, each with its standard error: the same quantity for every β and every loss.

An evaluation while training (dpo_ray.training) gives them, over the part of the held-out pairs that trials are ranked
on. A later source of another measure adds a line here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_ray.config.tune import Measure
from dpo_ray.estimates import proportion

_Z = 1.96  # of a 95% interval

Measured = dict[str, dict[str, float]]
"""Measure → its value, standard error (se) and the ends of its 95% interval (low, high)."""


@dataclass(frozen=True)
class _Source:
    key: str
    """Of an evaluation's metrics."""
    sign: int
    """Of the value against the metric."""
    higher_is_better: bool


_SOURCES: dict[Measure, _Source] = {
    "accuracy": _Source("eval_rewards/accuracies", 1, True),
    "margin": _Source("eval_margins", 1, True),
    "likelihood_drop": _Source("eval_logratios/chosen", -1, False),
    "chosen_logps": _Source("eval_logps/chosen", 1, True),
}

UNITS: dict[str, str] = {
    "accuracy": "share of pairs",
    "margin": "nats, without β",
    "likelihood_drop": "nats a chosen answer",
    "chosen_logps": "nats a chosen answer",
}


def higher_is_better(measure: Measure) -> bool:
    return _SOURCES[measure].higher_is_better


def measured(metrics: Mapping[str, Any]) -> Measured:
    """What an evaluation's metrics tell of the measures; a loss without a reference has no likelihood_drop."""
    found: Measured = {}
    for name, source in _SOURCES.items():
        if source.key not in metrics:
            continue
        value = source.sign * float(metrics[source.key])
        if name == "accuracy":
            count = int(metrics["eval_pairs"])
            interval = proportion(round(value * count), count)
            error = math.sqrt(max(value * (1 - value), 1 / count) / count)  # not 0 where all pairs are right
            found[name] = {"value": value, "se": error, "low": interval.low, "high": interval.high}
        else:
            error = float(metrics[f"{source.key}_se"])
            found[name] = {"value": value, "se": error, "low": value - _Z * error, "high": value + _Z * error}
    return found


def score(objective: Mapping[Measure, float], found: Measured) -> tuple[float, float] | None:
    """Of a weighted sum, larger being better: each measure counts in its own direction. The value and its standard
    error; None where a measure is missing.
    """
    if not objective.keys() <= found.keys():
        return None
    signs = {name: 1 if higher_is_better(name) else -1 for name in objective}
    value = sum(signs[name] * weight * found[name]["value"] for name, weight in objective.items())
    # Its terms are measured on the same pairs and hang together; this is never too small.
    return value, sum(weight * found[name]["se"] for name, weight in objective.items())


def distinguishable(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two scores (value, standard error) differ by more than chance would make them, at 95%."""
    return abs(one[0] - other[0]) > _Z * math.hypot(one[1], other[1])


def pareto_front(scores: Sequence[tuple[float, ...]]) -> list[int]:
    """Which of the points, larger being better, no other one is better than in one objective and as good in all."""

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(other != mine and all(o >= m for o, m in zip(other, mine, strict=True)) for other in scores)

    return [i for i, mine in enumerate(scores) if not beaten(mine)]
