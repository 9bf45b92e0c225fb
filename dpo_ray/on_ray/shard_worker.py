"""What runs on Ray of a row-wise stage: a worker that makes shards, and the task that looks at those left by a run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import pyarrow as pa

from dpo_ray.errors import EngineDied
from dpo_ray.on_ray.failures import carried
from dpo_ray.on_ray.metrics import ENGINE_START, RETRIES, Work, count, keep_telling, take_up, tell
from dpo_ray.shards.deaths import Deaths
from dpo_ray.shards.isolation import Attempts
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import Finished, ShardPool

ISOLATED = "isolated"
"""Name of the folder in an artifact's own, with a note on each of its shards that an engine could not do in full."""
NOTES = "attempts"
"""Folder of an unfinished artifact in which attempts are noted (dpo_ray.shards.deaths, dpo_ray.shards.isolation)."""

ShardFunction = Callable[..., ShardOutput]
"""Called with a task's source; where the pool isolates, with the shard's Attempts too."""


def write_shards(batch: pa.Table, **worker: Any) -> Iterator[pa.Table]:
    """A task of a stateless pool: the arguments are ShardWorker's."""
    yield from ShardWorker(**worker)(batch)


class ShardWorker:
    """A worker of the pool: builds its function once, then writes the shards of each batch of tasks.

    Of each task it gives back the `name`; and as `finished` the JSON of what the manifest needs (Finished), or the
    `failure` where there was one (dpo_ray.on_ray.failures).

    Args:
        location: the artifact's own folder. Its shards go into the pool beside it, notes on attempts into itself.
        at: what the driver is at, for the metrics.
    """

    def __init__(
        self,
        location: Location,
        build: Callable[..., Any],
        arguments: dict[str, Any],
        streams: bool = False,
        isolates: bool = False,
        stateless: bool = False,
        run: str = "",
        at: Work | None = None,
    ):
        if at is not None:
            take_up(at)
        self.location = location
        self.shards = ShardPool(location.parent)
        self.kind = location.parent.name
        self.streams = streams
        self.isolates = isolates
        self.run = run
        self.failure: bytes | None = None
        self._build = partial(build, **arguments)
        if stateless:
            return
        # Ray starts an actor that dies while it loads its model again, under the same id.
        building = Deaths(location / NOTES / f"{run}-worker-{_actor()}.json", f"to start {_named(build)}", run)
        began = time.monotonic()
        try:
            with self._attempt(building):
                _ = self.work
            tell(ENGINE_START, time.monotonic() - began, artifact=self.kind)
            keep_telling()
        except Exception as error:
            self.failure = carried(error)

    @cached_property
    def work(self) -> Any:
        """What makes shards, built where it is needed first."""
        return self._build()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        tasks = [pickle.loads(pickled) for pickled in batch["task"].to_pylist()]
        if self.streams and self.failure is None:
            yield from self._stream(tasks)
            return
        for name, source in tasks:
            yield _told(name, None, self.failure) if self.failure else self._try(name, source)

    def _stream(self, tasks: list[tuple[str, Any]]) -> Iterator[pa.Table]:
        unfinished = {n: name for n, (name, _) in enumerate(tasks)}
        try:
            for name in unfinished.values():
                self._count_retry(self._deaths(name).begin() > 0)
            for n, output in self.work.stream([source for _, source in tasks]):
                finished = self._write(unfinished[n], output)
                self._deaths(unfinished[n]).end()
                yield _told(unfinished.pop(n), finished, None)
        except Exception as error:
            failure = carried(error)
            for name in unfinished.values():
                self._deaths(name).end()
                yield _told(name, None, failure)

    def _try(self, name: str, source: Any) -> pa.Table:
        try:
            return _told(name, self.do(name, source), None)
        except Exception as error:
            return _told(name, None, carried(error))

    def do(self, name: str, source: Any) -> Finished:
        """Make the shard of one task."""
        if not self.isolates:
            with self._attempt(self._deaths(name)):
                return self._write(name, self.work(source))
        attempts = Attempts(self._note(name))
        self._count_retry(attempts.location.exists())
        try:
            output = self.work(source, attempts)
        except EngineDied:
            # Ray starts this actor again, and the attempts tell its successor where to go on.
            traceback.print_exc()
            sys.stderr.flush()
            # An engine on several GPUs has processes of its own, which would go on holding their memory.
            for process in multiprocessing.active_children():
                process.kill()
            os._exit(1)
        finished = self._write(name, output)
        if finished.quarantine is not None:
            # It took many attempts: the artifact that set rows aside takes its shard up again, and no other one.
            (self.location / ISOLATED / f"{name}.json").write_bytes(finished.model_dump_json().encode())
        attempts.clear()
        return finished

    @contextmanager
    def _attempt(self, deaths: Deaths) -> Iterator[None]:
        with deaths.attempt() as died:
            self._count_retry(died > 0)
            yield

    def _count_retry(self, again: bool) -> None:
        count(RETRIES, int(again), artifact=self.kind)

    def _note(self, name: str) -> Location:
        return self.location / NOTES / f"{name}.json"

    def _deaths(self, name: str) -> Deaths:
        beside = "" if not self.streams else ", with others beside it"
        return Deaths(self._note(f"{self.run}-{name}"), f"the shard {name} of {self.location}{beside}", self.run)

    def _write(self, name: str, output: ShardOutput) -> Finished:
        return self.shards.write(name, output.table, dict(output.counters), output.quarantine)


def _actor() -> str:
    import ray

    found = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
    return found or "local"


def _named(build: Callable[..., Any]) -> str:
    """A function, a class, or a partial of one."""
    built = getattr(build, "func", build)
    return str(getattr(built, "__qualname__", built))


def _told(name: str, finished: Finished | None, failure: bytes | None) -> pa.Table:
    text = finished.model_dump_json() if finished is not None else None
    return pa.table(
        {
            "name": [name],
            "finished": pa.array([text], pa.string()),
            "failure": pa.array([failure], pa.binary()),
        }
    )


def inspect_shards(batch: pa.Table, shards: ShardPool) -> Iterator[pa.Table]:
    """A task: shards, and what each of them is."""
    for name, has_its_quarantine in (pickle.loads(pickled) for pickled in batch["task"].to_pylist()):
        try:
            yield _told(name, shards.inspect(name, has_its_quarantine), None)
        except Exception as error:
            yield _told(name, None, carried(error))
