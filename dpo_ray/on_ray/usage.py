"""What a stage had of the cluster: told by who starts workers, and read by who records the stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Usage:
    """Of one stage, at most at one time."""

    workers: int = 0
    """Processes that computed; 0: nothing was computed, or by this process alone."""
    gpus: float = 0.0
    """Of all of them."""

    def add(self, workers: int, gpus_per_worker: float) -> None:
        """So many worked at once; those of the stage's other parts came before or after them."""
        self.workers = max(self.workers, workers)
        self.gpus = max(self.gpus, workers * gpus_per_worker)


_metered: ContextVar[Usage | None] = ContextVar("usage", default=None)


@contextmanager
def metered() -> Iterator[Usage]:
    """What is used until the block ends."""
    usage = Usage()
    token = _metered.set(usage)
    try:
        yield usage
    finally:
        _metered.reset(token)


def used(workers: int, gpus_per_worker: float) -> None:
    """Tell of workers that were asked for; nobody need listen."""
    if (usage := _metered.get()) is not None:
        usage.add(workers, gpus_per_worker)
