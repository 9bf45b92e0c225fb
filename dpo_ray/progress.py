"""One line of progress every few seconds: readable on a terminal and in a job's log alike."""

from __future__ import annotations

import sys
import time
from datetime import timedelta


class Progress:
    """Counts what a stage has done and prints rate and time left, at most every `interval` seconds."""

    def __init__(self, stage: str, total: int, unit: str, *, done: int = 0, interval: float = 5.0):
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self._first = done
        self._interval = interval
        self._start = time.monotonic()
        self._printed = float("-inf")

    def advance(self, amount: int, note: str = "") -> None:
        """Count and, where it is time, print. `note` is put after the rate."""
        self.done += amount
        now = time.monotonic()
        if now - self._printed < self._interval and self.done < self.total:
            return
        self._printed = now
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate > 0 else "?"
        parts = [
            f"{self.done}/{self.total} {self.unit}",
            f"{rate:.3g} {self.unit}/s",
            *([note] if note else []),
            f"{left} left",
        ]
        say(self.stage, " · ".join(parts))


def say(stage: str, text: str) -> None:
    """Print one line of a stage."""
    # Not print: Ray Train replaces it on its workers, and the line would come twice.
    sys.stderr.write(f"[{stage}] {text}\n")
    sys.stderr.flush()
