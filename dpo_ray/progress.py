"""Lines for the person who watches: one of progress every few seconds, readable on a terminal and in a log alike."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache

WATCHED = "DPO_RAY_WATCHED"
"""Environment variable of the processes whose output is read line by line, to tell these lines from what libraries say:
each begins with one of the marks then, and progress comes every so many seconds as the value says."""

LINE, PROGRESS = "\x1e", "\x1f"
"""The marks: of a line that stays, and of progress, which the next line of progress replaces. Nobody writes them."""

FIELDS_END = "\x1d"
"""Between the mark and it stand the line's fields as a JSON object: time, stage, shard and node."""

_INTERVAL = 5.0


@dataclass(frozen=True)
class Reached:
    """How far something has come that this process counts."""

    stage: str
    done: int
    total: int
    unit: str
    rate: float
    """Units a second, since it began."""
    parts_done: int
    """Shards, where it is counted by them."""
    parts: int
    """0: it is not counted by shards."""

    @property
    def seconds_left(self) -> float | None:
        """None where nothing tells."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None


@dataclass(frozen=True)
class Said:
    """A line that was said."""

    time: str
    """ISO, in UTC."""
    stage: str
    text: str


class Progress:
    """Counts what a stage has done and prints rate and time left, at most every `interval` seconds.

    Args:
        interval: None: 5, or what whoever watches asks for.
        parts: how many shards it is counted by.
    """

    def __init__(
        self, stage: str, total: int, unit: str, *, done: int = 0, interval: float | None = None, parts: int = 0
    ):
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self._first = done
        self._interval = interval if interval is not None else float(os.environ.get(WATCHED, _INTERVAL))
        self._start = time.monotonic()
        self._printed = float("-inf")
        self.parts, self.parts_done = parts, 0
        _counted[stage] = self

    def advance(self, amount: int, note: str = "", *, shard: str | None = None) -> None:
        """Count and, where it is time, print. `note` is put after the rate; `shard` is what was done last."""
        self.done += amount
        self.parts_done += shard is not None
        now = time.monotonic()
        if now - self._printed < self._interval and self.done < self.total:
            return
        self._printed = now
        rate = self.reached(now).rate
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate > 0 else "?"
        parts = [
            f"{self.done}/{self.total} {self.unit}",
            f"{rate:.3g} {self.unit}/s",
            *([note] if note else []),
            *([f"shard {shard} done"] if shard is not None else []),
            f"{left} left",
        ]
        _write(PROGRESS, self.stage, " · ".join(parts), shard)

    def reached(self, now: float | None = None) -> Reached:
        """now: by the monotonic clock."""
        seconds = (time.monotonic() if now is None else now) - self._start
        rate = (self.done - self._first) / max(seconds, 1e-9)
        return Reached(self.stage, self.done, self.total, self.unit, rate, self.parts_done, self.parts)


_counted: dict[str, Progress] = {}
_said: deque[Said] = deque(maxlen=8)
_waits: list[str] = []


def reached() -> list[Reached]:
    """What this process has counted since `forget`."""
    return [progress.reached() for progress in list(_counted.values())]


def forget() -> None:
    """What was counted is over."""
    _counted.clear()


def forget_all() -> None:
    """What was counted and said is another run's."""
    forget()
    _said.clear()


def last_said() -> list[Said]:
    """The last lines of this process, progress left out."""
    return list(_said)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Within it this process waits for something that is not in its hands."""
    _waits.append(what)
    try:
        yield
    finally:
        _waits.remove(what)


def waits_for() -> str | None:
    """What this process waits for, if it does."""
    return _waits[-1] if _waits else None


def say(stage: str, text: str) -> None:
    """Print one line of a stage."""
    _write(LINE, stage, text)


def aside(whose: str) -> None:
    """From now on the lines of this process are for the log alone, each with whose they are.

    Nobody could follow the lines of many trainings side by side; who runs them tells how they come on.
    """
    global _whose
    _whose = whose


_whose: str | None = None


@contextmanager
def silent(*, but: str) -> Iterator[None]:
    """Within it nothing is said by this process, except the lines of one stage."""
    global _only
    before, _only = _only, but
    try:
        yield
    finally:
        _only = before


_only: str | None = None


def _write(mark: str, stage: str, text: str, shard: str | None = None) -> None:
    if _only not in {None, stage}:
        return
    if mark == LINE:
        _said.append(Said(datetime.now(UTC).isoformat(timespec="seconds"), stage, text))
    head = ""
    if _whose is not None:
        stage = f"{stage}, {_whose}"
    elif WATCHED in os.environ:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        fields = {"time": now, "stage": stage, "shard": shard, "node": node()}
        head = f"{mark}{json.dumps(fields)}{FIELDS_END}"
    # Not print: Ray Train replaces it on its workers, and the line would come twice.
    sys.stderr.write(f"{head}[{stage}] {text}\n")
    sys.stderr.flush()


@cache
def node() -> str:
    """The name of the machine that this process runs on, or of its pod."""
    return socket.gethostname()
