"""metrics.jsonl → curves that a page can hold, however long the training was."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

MOST_POINTS = 400
"""Of a curve: about as many as a plot has pixels for."""
_HELD_OUT = "eval_"
_WINDOW = 0.03
"""Of all points, the share over which a smoothed curve's weights fall to 1/e, to either side."""


@dataclass(frozen=True)
class Curve:
    """A metric over the steps, in order; [n] each."""

    steps: list[int]
    raw: list[float]
    """Of a curve that was thinned the mean of the points that one stands for."""
    low: list[float]
    high: list[float]
    """Their smallest and largest."""
    smooth: list[float]
    """A moving average over all points, those before and those after."""
    num_points: int
    """Before it was thinned."""

    @property
    def is_thinned(self) -> bool:
        return self.num_points > len(self.steps)


@dataclass(frozen=True)
class Curves:
    trained: dict[str, Curve]
    """Metric → its curve over the training batches."""
    held_out: dict[str, Curve]
    """The same over held-out pairs, by the same names."""


def read_curves(lines: Iterable[bytes | str]) -> Curves:
    """The curves of a training; of each line only its numbers are kept.

    lines: of metrics.jsonl.
    """
    columns: dict[str, tuple[array[int], array[float]]] = {}
    for line in lines:
        metrics = json.loads(line)
        step = metrics.get("step")
        if step is None:
            continue
        for name, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                steps, values = columns.setdefault(name, (array("q"), array("d")))
                steps.append(step)
                values.append(value)
    curves = {name: _curve(np.asarray(steps), np.asarray(values)) for name, (steps, values) in columns.items()}
    return Curves(
        {name: curve for name, curve in curves.items() if not name.startswith(_HELD_OUT) and name != "step"},
        {name.removeprefix(_HELD_OUT): curve for name, curve in curves.items() if name.startswith(_HELD_OUT)},
    )


def _curve(steps: np.ndarray, values: np.ndarray) -> Curve:
    smooth = smoothed(values)
    parts = np.array_split(np.arange(len(values)), min(len(values), MOST_POINTS))
    return Curve(
        steps=[int(steps[part[-1]]) for part in parts],
        raw=[_short(values[part].mean()) for part in parts],
        low=[_short(values[part].min()) for part in parts],
        high=[_short(values[part].max()) for part in parts],
        smooth=[_short(smooth[part[-1]]) for part in parts],
        num_points=len(values),
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """[n] → [n]: the exponential moving averages from both ends, so that the curve does not come late."""
    found: np.ndarray = (_trailing(values) + _trailing(values[::-1])[::-1]) / 2
    return found


def _trailing(values: np.ndarray) -> np.ndarray:
    """At each point the weighted mean of what came before it and itself, without the pull of the start (as in Adam)."""
    keep = math.exp(-1 / max(1.0, _WINDOW * len(values)))
    found = np.empty(len(values))
    total = weight = 0.0
    for n, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1.0
        found[n] = total / weight
    return found


def _short(value: float) -> float:
    """To five digits: a page that holds thousands of numbers is half as large."""
    return float(f"{value:.5g}")
