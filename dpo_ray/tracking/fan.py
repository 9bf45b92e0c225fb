"""One stream of metrics to several trackers, none of which can stop or hold up who gives it.

Each tracker has a thread and a queue of its own. What fails is tried again while the run goes on, and told once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dpo_ray.tracking.credentials import without_credentials
from dpo_ray.tracking.record import Record
from dpo_ray.tracking.tracker import Model, Opening, Point, State, Tracker

_MOST_POINTS = 100_000
_TOGETHER = 500
"""Points that a tracker is given by one call, at most."""
_PAUSES_S = (5.0, 15.0, 30.0, 60.0)
_SILENT_S = 60.0
"""A call that takes longer is told of."""
_PATIENCE_S = 20.0
"""How long the end of a run waits for its trackers, all together."""

_GOES_ON = "The run goes on without it, and what it did not take is tried again until the run has ended."
_REFUSED = "The run goes on without it, and what it refused is not tried again."


class Fan:
    """All trackers of a run. No method raises or waits, except settle and close, which wait so long at most.

    Args:
        tell: told once of each tracker that fails: why, and what may be done.
        patience: seconds that settle and close wait, together at most.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        record: Record,
        tell: Callable[[str], None],
        *,
        patience: float = _PATIENCE_S,
        pauses: Sequence[float] = _PAUSES_S,
    ) -> None:
        self._feeds = [_Feed(tracker, record, tell, pauses) for tracker in trackers]
        self._patience = patience / 2
        """Of each of the two: what hangs is not to use up what the others need to be closed."""
        self._open: dict[str, None] = {}

    def open(self, opening: Opening) -> None:
        """Begin the run, or a trial of it."""
        if opening.whose not in self._open:
            self._open[opening.whose] = None
            self._each(lambda feed: feed.open(opening))

    def points(self, whose: str, points: Sequence[Point]) -> None:
        """Metrics of steps; those that a tracker has already are left out."""
        self._each(lambda feed: feed.points(whose, points))

    def conclude(self, whose: str, point: Point) -> None:
        """What was measured in the end."""
        self._each(lambda feed: feed.put(partial(feed.tracker.conclude, whose, point)))

    def keep(self, files: Sequence[Path]) -> None:
        """Keep files with the run."""
        self._each(lambda feed: feed.put(partial(feed.tracker.keep, files)))

    def register(self, model: Model) -> None:
        """Put a model into the registries."""
        self._each(lambda feed: feed.put(partial(feed.tracker.register, model)))

    def end(self, whose: str, state: State) -> None:
        """A run has ended, or a trial of it."""
        if whose in self._open:
            del self._open[whose]
            self._each(lambda feed: feed.put(partial(feed.tracker.close, whose, state)))

    def settle(self) -> None:
        """Wait until the trackers have what they were given, or have failed to take it."""
        until = time.monotonic() + self._patience
        for feed in self._feeds:
            feed.settle(until)

    def close(self, state: State) -> None:
        """End all that is open. What a tracker has not taken by then is given up, and told of."""
        for whose in reversed(list(self._open)):
            self.end(whose, state)
        until = time.monotonic() + self._patience
        self._each(lambda feed: feed.begin_to_close())
        for feed in self._feeds:
            feed.join(until)

    def figures(self) -> dict[str, Any]:
        """Tracker → how it went, for summary.json."""
        return {feed.tracker.name: feed.figures() for feed in self._feeds}

    def _each(self, give: Callable[[_Feed], None]) -> None:
        for feed in self._feeds:
            give(feed)


@dataclass
class _Points:
    whose: str
    points: list[Point]


class _Feed:
    """A tracker, its queue and its thread."""

    def __init__(self, tracker: Tracker, record: Record, tell: Callable[[str], None], pauses: Sequence[float]) -> None:
        self.tracker = tracker
        self._record, self._tell, self._pauses = record, tell, pauses
        self._queue: deque[Callable[[], Any] | _Points] = deque()
        self._waiting = 0
        self._last: dict[str, int] = {}
        """Whose → the last step that its tracker has."""
        self._given: dict[str, int] = {}
        """Whose → the last step that has come here."""
        self._changed = threading.Condition()
        self._closing = False
        self._is_dead = False
        """Its run could not be opened, and will not be."""
        self._told = False
        self._since: float | None = None
        """When the call began that is under way."""
        self._failing = 0
        self._failures = 0
        self._lost = 0
        self._reason: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"tracker {tracker.name}", daemon=True)
        self._thread.start()

    def open(self, opening: Opening) -> None:
        self.put(lambda: self._begin(opening))

    def put(self, call: Callable[[], Any]) -> None:
        with self._changed:
            self._queue.append(call)
            self._changed.notify_all()

    def points(self, whose: str, points: Sequence[Point]) -> None:
        with self._changed:
            new = []
            for point in points:
                if point.step > self._given.get(whose, 0):
                    self._given[whose] = point.step
                    new.append(point)
            room = max(0, _MOST_POINTS - self._waiting)
            self._lost += len(new[room:])
            self._waiting += len(new[:room])
            if new[:room]:
                self._queue.append(_Points(whose, new[:room]))
            self._changed.notify_all()
            since = self._since
        if since is not None and time.monotonic() - since > _SILENT_S:
            self._warn(f"has not answered for {_SILENT_S:.0f} s")

    def settle(self, until: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._queue or self._failing > 0, max(0.0, until - time.monotonic()))

    def begin_to_close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        with self._changed:
            left = len(self._queue)
        if left:
            self._warn("did not answer until the run had ended", "What it did not take is not there.")

    def figures(self) -> dict[str, Any]:
        with self._changed:
            return {
                "runs": self._record.ids(self.tracker.name),
                "failures": self._failures,
                "steps_not_logged": self._lost + self._waiting,
                "reason": self._reason or ("it did not answer in time" if self._queue else None),
            }

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                self._join_points()
                work = self._queue[0]
                self._since = time.monotonic()
            try:
                self._do(work)
            except Exception as error:  # whatever a library raises: the run goes on
                if not self._failed(error):
                    continue
            with self._changed:
                self._since = None
                self._queue.popleft()
                self._waiting -= len(work.points) if isinstance(work, _Points) else 0
                self._failing = 0
                self._changed.notify_all()

    def _join_points(self) -> None:
        """Metrics that have come while a call was under way go by one."""
        first = self._queue[0]
        while isinstance(first, _Points) and len(self._queue) > 1:
            other = self._queue[1]
            if not isinstance(other, _Points) or other.whose != first.whose:
                return
            if len(first.points) + len(other.points) > _TOGETHER:
                return
            first.points.extend(other.points)
            del self._queue[1]

    def _do(self, work: Callable[[], Any] | _Points) -> None:
        if self._is_dead:
            self._lost += len(work.points) if isinstance(work, _Points) else 0
            return
        if not isinstance(work, _Points):
            work()
            return
        last = self._last.get(work.whose, 0)
        new: list[Point] = []
        for point in work.points:
            if point.step > last:
                new.append(point)
                last = point.step
        for start in range(0, len(new), _TOGETHER):
            some = new[start : start + _TOGETHER]
            self.tracker.log(work.whose, some)
            self._last[work.whose] = some[-1].step
            if not self.tracker.remembers:
                self._record.came_to(self.tracker.name, work.whose, some[-1].step)

    def _begin(self, opening: Opening) -> None:
        known, step = self._record.run(self.tracker.name, opening.whose)
        identity, last = self.tracker.open(opening, known)
        self._last[opening.whose] = last if self.tracker.remembers else step
        self._record.opened(self.tracker.name, opening.whose, identity)

    def _failed(self, error: Exception) -> bool:
        """Tell of it, and wait where it may pass. Returns whether the work is given up."""
        try:
            may_pass = self.tracker.may_pass(error)
        except Exception:  # a library that cannot be imported fails in here too; what is told is the first error
            may_pass = False
        with self._changed:
            self._since = None
            self._failures += 1
            self._failing += 1
            self._reason = _short(error)
            self._changed.notify_all()
        self._warn(f"failed: {self._reason}", _GOES_ON if may_pass else _REFUSED)
        with self._changed:
            if may_pass and not self._closing:
                pause = self._pauses[min(self._failing, len(self._pauses)) - 1]
                self._changed.wait_for(lambda: self._closing, pause)
                return False
            work = self._queue[0]
            self._lost += len(work.points) if isinstance(work, _Points) else 0
            self._is_dead |= not self._last and not isinstance(work, _Points)
        return True

    def _warn(self, what: str, so: str = _GOES_ON) -> None:
        with self._changed:
            if self._told:
                return
            self._told = True
        self._tell(f"{self.tracker.name} {what}. {so} {self.tracker.way_out()}")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {without_credentials(' '.join(str(error).split()))[:300]}"


def flat(options: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Options by dotted path, as text."""
    found: dict[str, str] = {}
    for key, value in options.items():
        path = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            found |= flat(value, path)
        else:
            found[path] = str(value)
    return found
