"""From the steps that trainings tell of to the trackers, while they train."""

from __future__ import annotations

import threading

from dpo_ray.progress import say
from dpo_ray.storage.location import Location
from dpo_ray.tracking.fan import Fan
from dpo_ray.tracking.steps import StepReader, steps_folder
from dpo_ray.tracking.tracker import point_of

_POLL_S = 2.0


class Follower:
    """Brings the steps of trainings to the trackers while they train, in a thread of its own."""

    def __init__(self, fan: Fan, pause: float = _POLL_S) -> None:
        self._fan, self._pause = fan, pause
        self._readers: dict[str, StepReader] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._thread.start()

    def follow(self, whose: str, training: Location) -> None:
        """Args:
        whose: the run's, or a trial's.
        training: where its artifact lies, finished or not.
        """
        with self._lock:
            self._readers[whose] = StepReader(steps_folder(training))

    def leave(self, whose: str) -> None:
        """After what has been told so far."""
        with self._lock:
            reader = self._readers.pop(whose, None)
        if reader is not None:
            self._bring(whose, reader)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._pause):
            with self._lock:
                readers = dict(self._readers)
            for whose, reader in readers.items():
                self._bring(whose, reader)

    def _bring(self, whose: str, reader: StepReader) -> None:
        with reader.lock:  # what one thread has read first is to be given first
            self._bring_in_order(whose, reader)

    def _bring_in_order(self, whose: str, reader: StepReader) -> None:
        try:
            points = [point_of(line) for line in reader.new()]
        except (OSError, ValueError) as error:  # read again in a moment, from there on
            if not self._told:
                self._told = True
                say("track", f"metrics cannot be followed at the moment: {error}")
            return
        if points:
            self._fan.points(whose, points)
