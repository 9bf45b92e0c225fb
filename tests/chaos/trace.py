"""What processes of a run have begun and done, as tests/chaos/every_process notes it."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.chaos.running import Running
from tests.command_line import LONGEST


@dataclass(frozen=True)
class Event:
    """A line of the trace."""

    at: float
    """By the clock that all processes of a machine share and that never jumps."""
    pid: int
    node: str
    """driver, head, or the name of another node."""
    what: Literal["shard", "step", "publish"]
    name: str
    """<kind>/<task> of a shard, <rank>/<number> of a step, copy or move of a publication."""
    event: Literal["begun", "done"]

    @property
    def unit(self) -> tuple[str, str]:
        """What of is begun and done; a step by rank 0 is the step of all."""
        return self.what, self.name

    @property
    def kind(self) -> str:
        """Of a shard, its artifact's."""
        return self.name.partition("/")[0] if self.what == "shard" else self.what

    @property
    def step(self) -> int:
        """Of a training step, its number."""
        return int(self.name.partition("/")[2])

    @property
    def counts(self) -> bool:
        """Whether it is work of its own, and not the same step on another worker."""
        return self.what != "step" or self.name.startswith("0/")


@dataclass(frozen=True)
class Trace:
    """Since a moment."""

    file: Path
    since: float

    def events(self) -> list[Event]:
        if not self.file.exists():
            return []
        lines = self.file.read_text().splitlines()
        return [event for line in lines if (event := Event(**json.loads(line))).at >= self.since]

    def at_work(self, kind: str, run: Running, after: int = 1, of: Callable[[Event], bool] = lambda _: True) -> Event:
        """Wait until a process is in the middle of a shard or a step of a kind, and so many are done before.

        Args:
            after: shards that are done, or the number of the last step.
            of: which of the processes is meant.
        """
        for events in self._watched(run):
            mine = [event for event in events if event.kind == kind and of(event)]
            done = {event.unit for event in mine if event.event == "done"}
            enough = max((e.step for e in mine if e.unit in done), default=0) if kind == "step" else len(done)
            busy = [event for event in mine if event.event == "begun" and event.unit not in done and _runs(event.pid)]
            if enough >= after and busy:
                return busy[-1]
        raise AssertionError

    def wait_for(self, what: str, name: str, event: str, run: Running) -> Event:
        """Wait until that is noted."""
        for events in self._watched(run):
            if found := [e for e in events if (e.what, e.name, e.event) == (what, name, event)]:
                return found[-1]
        raise AssertionError

    def until_quiet(self) -> None:
        """Wait until no process runs that did any of the work: those of a run that was killed end soon after it."""
        deadline = time.monotonic() + LONGEST
        while any(_runs(pid) for pid in {event.pid for event in self.events()} - {os.getpid()}):
            assert time.monotonic() < deadline, "the workers of a run that has ended go on"
            time.sleep(0.2)

    def _watched(self, run: Running) -> Iterator[list[Event]]:
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline:
            ended = run.has_ended()
            yield self.events()
            assert not ended, f"the run ended before what was waited for:\n{run.log[-4000:]}"
            time.sleep(0.02)
        raise AssertionError(f"what was waited for did not come:\n{run.log[-4000:]}")

    def again(self) -> Counter[tuple[str, str]]:
        """How often each shard and each step was begun again."""
        begun = Counter(e.unit for e in self.events() if e.event == "begun" and e.counts and e.what != "publish")
        return Counter({unit: times - 1 for unit, times in begun.items() if times > 1})

    def new_work_after(self, moment: float) -> float | None:
        """When the first shard, step or publication was done that had not been done before; None: none was.

        It is looked for after a moment, and after all that was begun again since: what a fault kills may go on for a
        moment, and is then done again too.
        """
        events = sorted((event for event in self.events() if event.counts), key=lambda event: event.at)
        begun: set[tuple[str, str]] = set()
        since = moment
        for event in events:
            if event.event == "begun":
                since = max(since, event.at) if event.unit in begun and event.what != "publish" else since
                begun.add(event.unit)
        done = [event for event in events if event.event == "done"]
        before = {event.unit for event in done if event.at <= since}
        return min((event.at for event in done if event.at > since and event.unit not in before), default=None)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # it has ended, and nobody has asked how
