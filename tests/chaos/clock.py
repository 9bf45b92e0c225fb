"""A time of day that is wrong, for single processes and whenever a test wants it to be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cluster import HERE


@dataclass(frozen=True)
class WrongClock:
    """Of all processes that have its environment: what Python code is told there."""

    file: Path

    @property
    def env(self) -> dict[str, str]:
        path = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"CHAOS_CLOCK": str(self.file), "PYTHONPATH": path}

    def set(self, seconds: int) -> None:
        """From now on it is off by so many."""
        partial = self.file.with_suffix(".partial")
        partial.write_text(str(seconds))
        partial.replace(self.file)


def wrong_clock(file: Path, seconds: int = 0) -> WrongClock:
    """One that is off by so many seconds at first."""
    made = WrongClock(file)
    made.set(seconds)
    return made
