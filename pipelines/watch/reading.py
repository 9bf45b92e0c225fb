"""What is stored of a run → how it stands. A look is three small files at most, however many shards or steps there are.

summary.json    when it has ended; nothing of it changes any more
progress.json   by the driver, every few seconds (pipelines.live)
training.json   by a training worker likewise (dpo_ray.training.live)
metrics.jsonl   when it has ended, and was trained or came to some steps: read once
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from dpo_ray.errors import ConfigError
from dpo_ray.storage.location import Location
from dpo_ray.storage.process import has_ended
from dpo_ray.training.files import HISTORY
from dpo_ray.training.live import TrainingSoFar
from pipelines.history import newest_first, outcome_of
from pipelines.live import PROGRESS, TRAINING

State = Literal["ended", "running", "waiting", "silent", "dead", "unknown"]
"""silent: it gave no sign for a while, and whether it lives cannot be told from here. dead: its process has ended, and
has written no summary. unknown: there is no sign to go by."""

SUMMARY = "summary.json"
SILENT_S = 60.0
"""Seconds without a sign after which a run counts as silent, as a lease would expire."""


@dataclass(frozen=True)
class Look:
    """How a run stood at one look."""

    run_id: str
    state: State
    outcome: str
    """Of a run that has ended, as `dpo-ray show` has it; otherwise what the state means, in words."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    """As in progress.json; empty where there is none."""
    training: Mapping[str, Any] | None = None
    """As in training.json, where a training is at work or was the last that there was."""
    summary: Mapping[str, Any] | None = None


def run_folder(place: Location) -> Location:
    """A run's folder itself, or that of the newest run of an output folder. Raises ConfigError where there is none."""
    if place.parent.name == "runs" and (place / "config.yaml").exists():
        return place
    names = newest_first(place / "runs")
    if not names:
        raise ConfigError(f"{place} holds no run: name the folder given as run.output, or a folder below its runs/.")
    return place / "runs" / names[0]


class Watched:
    """A run's folder, looked at again and again.

    Args:
        now: seconds by a clock that only goes on.
        wall: seconds since the epoch, to be compared with the store's.
    """

    def __init__(
        self, folder: Location, now: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ):
        self.folder = folder
        self._now, self._wall = now, wall
        self._summary: dict[str, Any] | None = None
        self._beat: int | None = None
        self._since = 0.0

    def look(self) -> Look:
        if self._summary is None and (summary := _read(self.folder / SUMMARY)) is not None and not self._goes_on():
            self._summary = summary
        progress = _read(self.folder / PROGRESS) or {}
        if self._summary is not None:
            outcome = outcome_of(self._summary)
            return Look(self.folder.name, "ended", outcome, progress, self._trained, self._summary)
        state, words = self._alive(progress)
        at = (progress.get("at") or {}).get("stage", "")
        training = _read(self.folder / TRAINING) if at.startswith("train") else None
        return Look(self.folder.name, state, words, progress, training)

    def _goes_on(self) -> bool:
        """Whether the run was begun again under its name since it ended, by the store's times: a run that ends writes
        its summary last."""
        ended, told = ((self.folder / name).written() for name in (SUMMARY, PROGRESS))
        return ended is not None and told is not None and told > ended

    def _alive(self, progress: Mapping[str, Any]) -> tuple[State, str]:
        if not progress:
            return "unknown", "it has not ended, and no sign of it is stored"
        process = progress["process"]
        if has_ended(process["machine"], process["pid"], process["process"]):
            return "dead", f"its process {process['pid']} of {process['by']} has ended without a word: killed, it seems"
        silent = self._silent(progress["beat"])
        if silent >= SILENT_S:
            return "silent", (
                f"no sign for {silent:.0f} s from process {process['pid']} of {process['by']}: it was killed, its "
                "machine is gone, or it cannot write"
            )
        return ("waiting", "it waits") if progress["waits_for"] else ("running", "it runs")

    def _silent(self, beat: int) -> float:
        """Seconds since the last sign. At the first look by the store's time and this machine's, then by how long the
        same one was seen."""
        if beat != self._beat:
            first, self._beat = self._beat is None, beat
            self._since = self._now()
            if first and (written := (self.folder / PROGRESS).written()) is not None:
                self._since -= max(0.0, self._wall() - written)
        return self._now() - self._since

    @cached_property
    def _trained(self) -> Mapping[str, Any] | None:
        """Of a run that has ended: the whole curves where they are there, or what its training had come to."""
        so_far = _read(self.folder / TRAINING)
        try:
            lines = (self.folder / HISTORY).read_bytes().splitlines()
        except FileNotFoundError:
            return so_far
        history = [json.loads(line) for line in lines]
        trained: dict[str, Any] = json.loads(TrainingSoFar(history[-1]["step"], 0, history).content())
        told = {key: so_far[key] for key in ("num_steps", "workers", "gpu_memory")} if so_far is not None else {}
        return trained | told


def _read(file: Location) -> dict[str, Any] | None:
    """None: there is no such file. Files appear whole, so that one that is no JSON was damaged.

    Raises ConfigError on that.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{file} is damaged ({error}), so that what it says of the run cannot be shown. Read log.txt beside it."
        ) from error
    return found
