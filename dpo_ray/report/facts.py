"""What a report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_ray.config import BASE_MODEL, Config
from dpo_ray.report.curves import Curves
from dpo_ray.report.document import Section


@dataclass(frozen=True)
class Before:
    """The model that was published under the name before this one, and the run that made it."""

    version: str
    since: str
    """When it was published."""
    run_id: str | None
    summary: Mapping[str, Any]
    """That run's summary.json; empty where it is gone."""
    options: Sequence[tuple[str, str, str]]
    """Dotted path, that run's value, this run's: where they differ."""


@dataclass(frozen=True)
class Facts:
    """What is known of a run."""

    config: Config
    """What the model was made with: of a sweep that of the trial that was chosen."""
    given: Config
    """What the run was given."""
    summary: Mapping[str, Any]
    """As summary.json has it."""
    curves: Curves = field(default_factory=lambda: Curves({}, {}))
    samples: Sequence[Mapping[str, Any]] = ()
    """As of dpo_ray.evaluation.comparison.shown_samples."""
    before: Before | None = None
    more: Sequence[Section] = ()
    """What comes first, where the run is a sweep or rounds."""

    @property
    def evaluation(self) -> Mapping[str, Any]:
        return self.summary.get("eval") or {}

    @property
    def opponent(self) -> str:
        """The model that answers are compared with, in a sentence."""
        return str(self.evaluation.get("against") or BASE_MODEL)

    @property
    def other(self) -> str:
        """The same, at the head of a column."""
        return "before" if self.opponent == BASE_MODEL else self.opponent

    def stage(self, name: str) -> Mapping[str, Any] | None:
        """Its entry, whichever of several ways the run has done it; None where it did not."""
        for key, entry in self.summary["stages"].items():
            if key == name or key.startswith(f"{name} ("):
                found: Mapping[str, Any] = entry
                return found
        return None
