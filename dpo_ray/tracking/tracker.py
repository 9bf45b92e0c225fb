"""What every experiment tracker is asked for."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["finished", "failed", "stopped"]
Alias = Literal["champion", "candidate"]

_HELD_OUT = "eval_"


@dataclass(frozen=True)
class Opening:
    """A run of a tracker."""

    whose: str
    """Empty: the run itself; else a trial of its sweep, whose run is nested below the run's own."""
    name: str
    params: Mapping[str, str]
    """Options by dotted path."""


@dataclass(frozen=True)
class Point:
    """The metrics of one step."""

    step: int
    when: float
    """In seconds since the epoch."""
    values: Mapping[str, float]


@dataclass(frozen=True)
class Model:
    """A trained model, for a registry."""

    uri: str
    version: str
    """Its fingerprint, by which it is known again."""
    alias: Alias | None
    """What the registry is to call it from now on; None: as it does."""
    tags: Mapping[str, str]


class Tracker(ABC):
    """One tracker. Each method may raise whatever its library does, and may take long: nobody waits for it."""

    name: str
    remembers = True
    """Whether `open` finds out by itself which step a run has come to."""

    @abstractmethod
    def open(self, opening: Opening, known: str | None) -> tuple[str, int]:
        """Begin a run, or go on with the one of this id. Returns its id, and the last step that it has, 0 for none."""

    @abstractmethod
    def log(self, whose: str, points: Sequence[Point]) -> None:
        """Take the metrics of steps, in order."""

    @abstractmethod
    def conclude(self, whose: str, point: Point) -> None:
        """Take what was measured in the end; again, where a run that was interrupted comes to it once more."""

    def keep(self, files: Sequence[Path]) -> None:  # noqa: B027  one that keeps none is whole
        """Keep files with the run."""

    def register(self, model: Model) -> None:  # noqa: B027  one without a registry is whole
        """Make a model a version of the registered one."""

    @abstractmethod
    def close(self, whose: str, state: State) -> None:
        """The run has ended."""

    def may_pass(self, error: Exception) -> bool:
        """Whether the same may go well later."""
        return isinstance(error, OSError)

    @abstractmethod
    def way_out(self) -> str:
        """What a person may do about a failure, a sentence."""


def point_of(metrics: Mapping[str, Any]) -> Point:
    """Of a line of metrics.jsonl; what is no number is left out, and held-out pairs are told from trained ones."""
    values = {
        _named(key): float(value)
        for key, value in metrics.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return Point(int(metrics["step"]), time.time(), values)


def _named(key: str) -> str:
    return f"eval/{key.removeprefix(_HELD_OUT)}" if key.startswith(_HELD_OUT) else f"train/{key}"
