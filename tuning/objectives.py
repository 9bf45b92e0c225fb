"""Objectives as people read them, and values beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_ray.config import Tune
from dpo_ray.config.tune import Measure
from tuning.measures import UNITS, Measured, higher_is_better, score

_Z = 1.96  # of a 95% interval


@dataclass(frozen=True)
class ShownObjective:
    """An objective as people read it: one measure in its own direction and unit, or the weighted sum of several.

    `tuning.measures.score` turns the sign of a measure that is better when smaller; this does not.
    """

    weights: Mapping[Measure, float]

    @property
    def name(self) -> str:
        if len(self.weights) == 1:
            return next(iter(self.weights)).replace("_", " ")
        name = ""
        for measure, weight in self.weights.items():
            factor = "" if weight == 1 else f"{weight:g}·"
            name += f"{' + ' if higher_is_better(measure) else ' − '}{factor}{measure.replace('_', ' ')}"
        return name.removeprefix(" + ").lstrip()

    @property
    def unit(self) -> str:
        return UNITS[next(iter(self.weights))] if len(self.weights) == 1 else "weighted sum"

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"held-out {self.name} ({self.unit})"

    @property
    def higher_is_better(self) -> bool:
        return len(self.weights) > 1 or higher_is_better(next(iter(self.weights)))

    def of(self, found: Measured) -> dict[str, float] | None:
        """Value, standard error (se) and ends of the 95% interval (low, high); None where a measure is missing or is
        not finite."""
        scored = score(self.weights, found)
        if scored is None or not all(math.isfinite(number) for number in scored):
            return None
        if len(self.weights) == 1:
            return found[next(iter(self.weights))]
        value, error = scored
        return {"value": value, "se": error, "low": value - _Z * error, "high": value + _Z * error}

    def of_score(self, scored: tuple[float, float]) -> tuple[float, float]:
        """Value and standard error of a score of this objective, in its own direction and unit."""
        if len(self.weights) > 1:
            return scored
        factor = next(iter(self.weights.values())) * (1 if self.higher_is_better else -1)
        return scored[0] / factor, scored[1] / abs(factor)


def shown_objectives(tune: Tune) -> tuple[ShownObjective, ...]:
    """Those of the sweep, the first one being what chooses."""
    return tuple(ShownObjective(weights) for weights in tune.objectives())


def rounded(value: float, error: float) -> str:
    """A value with as many decimals as its error leaves a meaning to: two digits of the error."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return f"{value:.3g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(error)))}f}"


def shown(value: Any) -> str:
    """A searched value, for people."""
    if isinstance(value, float):
        mantissa, exponent, power = (f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}").partition("e")
        return f"{float(mantissa):g}e{int(power)}" if exponent else mantissa
    return value if isinstance(value, str) else json.dumps(value)


def better(objective: ShownObjective) -> str:
    """In which direction it is better."""
    return "higher is better" if objective.higher_is_better else "lower is better"
