"""Sweeps of the tests' own: a grid, forty trials over three losses, two objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_ray.config import Config, parse_config
from dpo_ray.config.tune import Range
from tuning.measures import Measured, measured
from tuning.records import Trial
from tuning.space import Point, drawn, points

PAIRS = 400  # that each measure is over


def config_of(tune: Mapping[str, Any]) -> Config:
    """A configuration with this section tune."""
    return parse_config(
        {
            "run": {"name": "searched", "output": "o"},
            "model": {"path": "base"},
            "data": {"train": "t"},
            "train": {"eval_every_steps": 20},
            "tune": dict(tune),
        }
    )


def measures(accuracy: float, margin: float = 1.0, drop: float = 2.0) -> Measured:
    """As an evaluation gives them."""
    return measured(
        {
            "eval_pairs": PAIRS,
            "eval_rewards/accuracies": accuracy,
            "eval_margins": margin,
            "eval_margins_se": 0.1,
            "eval_logratios/chosen": -drop,
            "eval_logratios/chosen_se": 0.2,
        }
    )


def trial_of(number: int, point: Point, accuracy: float | None = None, **fields: Any) -> Trial:
    """A trial of 100 steps that has come to `step` (all of them), evaluated each 20 steps on its way to `accuracy`."""
    others = {key: fields.pop(key) for key in ("margin", "drop") if key in fields}
    fields = {"state": "finished", "step": 100, "num_steps": 100, "seed": 0, "seconds": 60.0, **fields}
    if accuracy is None:
        return Trial(number=number, point=point, **fields)
    on_the_way = [
        {"step": s, "loss": 0.7 - s / 1000, "measured": measures(0.5 + (accuracy - 0.5) * s / fields["step"], **others)}
        for s in range(20, fields["step"] + 1, 20)
    ]
    return Trial(number=number, point=point, evaluations=on_the_way, measured=measures(accuracy, **others), **fields)


GRID = config_of(
    {"beta": [0.05, 0.1, 0.5], "learning_rate": [1e-7, 1e-6, 1e-5], "scheduler": {"type": "asha", "grace_steps": 20}}
)
ACCURACIES = (0.61, 0.66, None, 0.63, 0.74, 0.58, 0.60, 0.73, 0.57)
STOPPED, DIVERGED = (5, 8), 2


def grid_trials() -> list[Trial]:
    """A grid of 3 × 3: trial 4 the best and 7 as good, 5 and 8 stopped after 40 steps, 2 diverged before it was
    measured."""
    assert GRID.tune is not None
    trials = []
    for number, (point, accuracy) in enumerate(zip(points(GRID.tune.searched()), ACCURACIES, strict=True)):
        fields: dict[str, Any] = {}
        if number in STOPPED:
            fields = {"state": "stopped", "step": 40, "seconds": 24.0, "reason": "Among the worse at step 40."}
        elif number == DIVERGED:
            fields = {"state": "diverged", "step": 13, "seconds": 9.0, "reason": "The loss is nan at step 13."}
        trials.append(trial_of(number, point, accuracy, **fields))
    return trials


LOSSES = config_of(
    {
        "search": "random",
        "num_trials": 40,
        "scheduler": "asha",
        "space": {
            "train.loss": {
                "choice": [
                    {"type": "sigmoid", "beta": {"loguniform": [0.01, 0.5]}},
                    {"type": "ipo", "beta": {"loguniform": [0.05, 1.0]}},
                    {"type": "orpo"},
                ]
            },
            "train.learning_rate": {"loguniform": [1e-7, 1e-4]},
            "train.epochs": {"integer": [1, 3]},
            "train.schedule": ["cosine", "constant"],
        },
    }
)


class Random:
    """Values by chance."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.point: Point = {}

    def number(self, name: str, found: Range) -> float | int:
        if found.kind == "integer":
            value: float | int = int(self._random.integers(int(found.low), int(found.high) + 1))
        elif found.kind == "loguniform":
            value = math.exp(self._random.uniform(math.log(found.low), math.log(found.high)))
        else:
            value = self._random.uniform(found.low, found.high)
        self.point[name] = value
        return value

    def label(self, name: str, labels: list[str]) -> str:
        self.point[name] = str(self._random.choice(labels))
        return str(self.point[name])


def random_trials(config: Config, count: int) -> list[Trial]:
    """Trials of which the best have a learning rate near 5e-6; the largest ones diverge, and some are stopped."""
    assert config.tune is not None
    trials = []
    for number in range(count):
        draw = Random(number)
        drawn(config.tune.searched(), draw)
        far = abs(math.log10(draw.point["train.learning_rate"] / 5e-6))
        noise = 0.02 * math.sin(7 * number)
        accuracy = 0.75 - 0.1 * far + noise + 0.03 * (draw.point.get("train.loss") == "sigmoid")
        others = {"margin": 2.0 - 0.5 * far + 5 * noise, "drop": 6.0 - 2.0 * far - 20 * noise}
        if draw.point["train.learning_rate"] > 4e-5:
            trials.append(trial_of(number, draw.point, 0.5, state="diverged", step=31, reason="The loss is nan."))
        elif far > 0.8 and number % 2:
            trials.append(trial_of(number, draw.point, accuracy - 0.05, **others, state="stopped", step=40))
        elif number == 11:
            trials.append(trial_of(number, draw.point, state="failed", step=0, reason="A worker died."))
        else:
            trials.append(trial_of(number, draw.point, accuracy, **others))
    return trials


TWO = config_of(
    {
        "search": "tpe",
        "num_trials": 24,
        "rank_by": ["accuracy", "likelihood_drop"],
        "space": {"train.loss.beta": {"loguniform": [0.01, 0.5]}, "train.learning_rate": {"loguniform": [1e-7, 1e-4]}},
    }
)


def finished(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state == "finished"]


def accuracy(trial: Trial) -> float:
    return trial.measured["accuracy"]["value"]
