"""Which run of each tracker a run is, kept in its folder, so that one that was interrupted goes on in the same."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any

from dpo_ray.storage.location import Location

RECORD = "trackers.json"
_BY_CONFIGURATION = "tracked"
_ENDED = (0, 4)
"""Exit codes of runs that are not gone on with."""


class Record:
    """Tracker → whose → id of its run, and the step that it has come to where the tracker itself cannot tell."""

    def __init__(self, folder: Location, runs: dict[str, dict[str, dict[str, Any]]] | None = None) -> None:
        self._folder = folder
        self._runs = runs or {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, output: Location, folder: Location, config: str, at_work: Callable[[Location, float], bool]) -> Record:
        """Of a run that begins: with what an earlier one of the same configuration has left that did not come to its
        end, where there is one. One that still works keeps its own.

        Args:
            output: run.output.
            folder: the run's.
            config: as the run's folder has it.
            at_work: of a run's folder, and the store's time, whether it still works.
        """
        mine = output / _BY_CONFIGURATION / f"{hashlib.sha256(config.encode()).hexdigest()[:16]}.json"
        before = _read(mine)
        mine.write_bytes(json.dumps({"run_id": folder.name}).encode())
        runs = None
        if before is not None:
            earlier = output / "runs" / before["run_id"]
            summary = _read(earlier / "summary.json")
            if summary is None or summary["exit_code"] not in _ENDED:
                runs = _read(earlier / RECORD)
            if runs and earlier.name != folder.name and at_work(earlier, mine.written() or 0.0):
                runs = None
        record = cls(folder, runs)
        if runs:
            record._write()
        return record

    def run(self, tracker: str, whose: str) -> tuple[str | None, int]:
        """Its id, None where it has none yet, and the step."""
        with self._lock:
            found = self._runs.get(tracker, {}).get(whose, {})
            return found.get("id"), found.get("step", 0)

    def ids(self, tracker: str) -> dict[str, str]:
        """Whose → id."""
        with self._lock:
            return {whose: found["id"] for whose, found in self._runs.get(tracker, {}).items()}

    def opened(self, tracker: str, whose: str, identity: str) -> None:
        self._put(tracker, whose, id=identity)

    def came_to(self, tracker: str, whose: str, step: int) -> None:
        self._put(tracker, whose, step=step)

    def _put(self, tracker: str, whose: str, **values: Any) -> None:
        with self._lock:
            found = self._runs.setdefault(tracker, {}).setdefault(whose, {})
            if found.items() >= values.items():
                return
            found |= values
            self._write()

    def _write(self) -> None:
        (self._folder / RECORD).write_bytes(json.dumps(self._runs, indent=1).encode())


def _read(file: Location) -> Any:
    """What a JSON file holds; None where it is not there, or damaged."""
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
