"""Python runs this at the start of every process that has this folder in PYTHONPATH, Ray's too.

It notes in the file CHAOS_TRACE, a line of JSON each, what the process begins and has done: shards, training steps, two
moments of a publication. It slows them by the seconds that CHAOS_SLOW tells: a fault can come in their middle. And in a
process that has CHAOS_CLOCK the time of day, as Python code sees it, is off by the seconds in that file, whenever these
change; the monotonic clock and the times of files are as they were.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TRACE = os.environ.get("CHAOS_TRACE")
CLOCK = os.environ.get("CHAOS_CLOCK")
OURS = ("dpo_ray.", "pipelines.", "tuning.")
SLOW: dict[str, float] = json.loads(os.environ.get("CHAOS_SLOW", "{}"))


def note(what: str, name: str, event: str) -> None:
    """What: shard, step or publish; event: begun or done. One write, so that lines of processes do not mix."""
    line = {"at": time.monotonic(), "pid": os.getpid(), "node": os.environ.get("CHAOS_NODE", "driver")}
    line |= {"what": what, "name": name, "event": event}
    file = os.open(str(TRACE), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, json.dumps(line).encode() + b"\n")
    finally:
        os.close(file)


def slow(what: str) -> None:
    time.sleep(SLOW.get(what, 0.0))


def shards(shard_worker: ModuleType) -> None:
    worker = shard_worker.ShardWorker
    do, stream, write = worker.do, worker._stream, worker._write

    def traced_do(self: Any, name: str, source: Any) -> Any:
        note("shard", f"{self.location.parent.name}/{name}", "begun")
        slow("shard")
        return do(self, name, source)

    def traced_stream(self: Any, tasks: list[tuple[str, Any]]) -> Any:
        for name, _ in tasks:
            note("shard", f"{self.location.parent.name}/{name}", "begun")
        slow("shard")
        return stream(self, tasks)

    def traced_write(self: Any, name: str, output: Any) -> Any:
        finished = write(self, name, output)
        note("shard", f"{self.location.parent.name}/{name}", "done")
        return finished

    worker.do, worker._stream, worker._write = traced_do, traced_stream, traced_write


def steps(module: ModuleType) -> None:
    step = module.Learner.step

    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = f"{self.me.rank}/{self.state.next_step + 1}"
        note("step", name, "begun")
        slow("step")
        result = step(self, *args, **kwargs)
        note("step", name, "done")
        return result

    module.Learner.step = traced


def copying(publish: ModuleType) -> None:
    copy = publish._copy_files

    def traced(*args: Any) -> None:
        copy(*args)
        note("publish", "copy", "begun")  # its files are there, its card and its name are not
        slow("publish")

    publish._copy_files = traced


def moving(location: ModuleType) -> None:
    write = location.Location.write_bytes

    def traced(self: Any, data: Any) -> None:
        moves = self.name == "latest.json"
        if moves:
            note("publish", "move", "begun")  # its record is written, the pointer is not
            slow("publish")
        write(self, data)
        if moves:
            note("publish", "move", "done")

    location.Location.write_bytes = traced


TRACED: dict[str, Callable[[ModuleType], None]] = {
    "dpo_ray.on_ray.shard_worker": shards,
    "dpo_ray.training.step": steps,
    "pipelines.publish": copying,
    "dpo_ray.storage.location": moving,
}


class WrongDay(datetime.datetime):
    """What our modules are given for datetime.datetime."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(time.time(), tz)


def set_clock(file: str) -> None:
    right, right_ns = time.time, time.time_ns

    def off() -> int:
        with open(file) as text:
            return int(text.read())

    def wrong() -> float:
        return right() + off()

    def wrong_ns() -> int:
        return right_ns() + off() * 1_000_000_000

    for name, stand_in in (("time", wrong), ("time_ns", wrong_ns)):
        # Ray sends them to other processes, by name.
        stand_in.__module__, stand_in.__name__, stand_in.__qualname__ = "time", name, name
        setattr(time, name, stand_in)


class Ours:
    """Finds our modules, and has them altered once they are executed."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(OURS):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            if TRACE and name in TRACED:
                TRACED[name](module)
            if CLOCK and getattr(module, "datetime", None) is datetime.datetime:
                module.datetime = WrongDay  # type: ignore[attr-defined]

        with suppress(AttributeError):  # a package without a file
            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


if CLOCK:
    set_clock(CLOCK)
if TRACE or CLOCK:
    sys.meta_path.insert(0, Ours)
