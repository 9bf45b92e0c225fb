"""Row-wise stages: every shard is a task of its own, carried by Ray Data to a pool of workers.

A worker writes its shard itself, atomically and under a name that says what it was made from. So a run that is
killed loses the shards in flight and no others, and a stage over more input computes only what is new.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import sys
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import pyarrow as pa

from dpo_ray.config import Config
from dpo_ray.errors import EngineDied
from dpo_ray.on_ray.failures import carried, raise_ours
from dpo_ray.on_ray.session import connect, is_embedded, num_cores
from dpo_ray.progress import Progress, say
from dpo_ray.shards.deaths import Deaths
from dpo_ray.shards.isolation import Attempts
from dpo_ray.shards.output import Shard, ShardOutput
from dpo_ray.storage.artifact import (
    MANIFEST,
    SCHEMA_VERSION,
    Artifact,
    Contents,
    FileEntry,
    describe_file,
    digest,
    inspect_shard,
    lost_files,
    make,
    place,
    write_shard,
)
from dpo_ray.storage.location import Location

NOTES = "attempts"
"""Folder of an unfinished artifact in which attempts are noted (dpo_ray.shards.deaths, dpo_ray.shards.isolation)."""

ShardFunction = Callable[..., ShardOutput]
"""Called with a task's source; where the pool isolates, with the shard's Attempts too."""

Source = TypeVar("Source")


@dataclass(frozen=True)
class ShardTask(Generic[Source]):
    """One unit of work."""

    source: Source
    """Where the worker finds its rows: what its function takes."""
    content: str
    """What the rows are: a content hash, and whatever of the source changes the result."""
    rows: int


@dataclass(frozen=True)
class Pool:
    """The workers of a stage, and what Ray sets aside for each."""

    build: Callable[..., ShardFunction]
    """Class of the worker; built once in each actor with `arguments`."""
    arguments: dict[str, Any]
    stateless: bool = False
    """The worker costs nothing to build: it is built for each shard, in tasks, whose processes serve the next stage as
    well. Otherwise an actor keeps it, in a process of its own that takes seconds to start."""
    num_actors: int | None = None
    """At most: Ray Data starts with one, and adds more while tasks wait and the cluster has room. None: as many as
    there is room for, on an embedded Ray one a core."""
    together: int = 1
    """Shards that a worker is given at once, at most. Above 1 its `stream` takes their sources, and yields the number
    and the output of each as it is finished: an engine then runs half empty at the end of many, and not of each."""
    isolates: bool = False
    """The worker finds the rows that it cannot do and quarantines them, also those that kill its process."""
    num_cpus: float = 1.0
    num_gpus: float = 0
    env: dict[str, str] = field(default_factory=dict)
    why: str = "a worker, and one CPU to read and write"
    """The configuration keys behind these numbers."""


def shard_tasks(artifact: Artifact) -> list[ShardTask[Shard]]:
    """One task for each shard of a finished artifact."""
    return [
        ShardTask(source=Shard((artifact.location / f.name).uri), content=f.sha256, rows=f.rows)
        for f in artifact.manifest.files
        if f.rows is not None
    ]


def each_its_own(tasks: list[ShardTask[Source]]) -> list[ShardTask[Source]]:
    """The same tasks, those of equal content told apart: copies of a shard would otherwise be done and counted once."""
    seen: Counter[str] = Counter()
    own = []
    for task in tasks:
        copy = seen[task.content]
        seen[task.content] += 1
        own.append(replace(task, content=f"{task.content}:copy {copy}") if copy else task)
    return own


def shard_stage(
    output: Location,
    kind: str,
    *,
    identity: dict[str, Any],
    inputs: dict[str, str],
    tasks: list[ShardTask[Any]],
    pool: Pool,
    unit: str = "rows",
) -> tuple[Artifact, bool]:
    """The artifact that the workers make of these tasks, and whether it was finished already.

    Args:
        output: the folder run.output.
        identity: options that change the result; the fingerprint covers them and the inputs.
    """
    _reopen_without_lost(place(output, kind, identity, inputs), kind)

    def compute(location: Location) -> Contents:
        # A name covers all that a shard depends on, so that a sibling artifact's shard can be taken over.
        names = [f"{digest([kind, SCHEMA_VERSION, identity, task.content])}.parquet" for task in tasks]
        finished = set(_take_over(output / "artifacts" / kind, location, set(names), pool.isolates))
        missing = [(n, t) for n, t in dict(zip(names, tasks, strict=True)).items() if n not in finished]
        say(kind, f"{len(finished)} of {len(names)} shards are finished already, {len(missing)} to compute")
        if missing:
            _compute(kind, location, missing, pool, unit)
        return _contents(location, names)

    artifact, reused = make(output, kind, identity, inputs, compute)
    if reused:
        say(kind, f"reused: {artifact.manifest.counters['kept']} rows in {artifact.location}")
    return artifact, reused


def _reopen_without_lost(location: Location, kind: str) -> None:
    """Make an artifact that has lost files an unfinished one, which lacks just these."""
    lost = lost_files(location, kind, location.name)
    if not lost:
        return
    for name in lost:
        (location / name.removeprefix("quarantine/")).remove()  # a quarantine is made with its shard
    (location / MANIFEST).remove()  # last, for what is lost is known by it
    say(kind, f"{location} has lost {len(lost)} files, the first being {lost[0]}: they are made again")


def _contents(location: Location, names: list[str]) -> Contents:
    """Of the finished shards of these names, each once, with their quarantines and the sum of their counters."""
    entries: dict[str, FileEntry] = {}
    counters: Counter[str] = Counter()
    quarantines: list[FileEntry] = []
    for name in dict.fromkeys(names):
        entries[name], counts = inspect_shard(location / name)
        counters.update(counts)
        quarantine = location / "quarantine" / name
        if quarantine.exists():
            entry = describe_file(quarantine)
            quarantines.append(entry.model_copy(update={"name": f"quarantine/{name}"}))
    if "kept" not in counters:  # a stage whose rows are not those that it keeps counts them itself
        counters["kept"] = sum(e.rows or 0 for e in entries.values())
    return Contents(files=[*entries.values(), *quarantines], counters=dict(sorted(counters.items())))


def _take_over(stage_folder: Location, location: Location, wanted: set[str], isolates: bool) -> list[str]:
    """Names of the wanted shards that exist, here or copied from another artifact of the same stage.

    Args:
        isolates: a row in quarantine is one that an engine failed on, which is tried again and not inherited.
    """
    present = {child.name for child in location.children()} & wanted
    for sibling in stage_folder.children():
        if sibling == location or present == wanted:
            continue
        for name in sorted(({child.name for child in sibling.children()} & wanted) - present):
            quarantine = sibling / "quarantine" / name
            if quarantine.exists():
                if isolates:
                    continue
                quarantine.copy_to(location / "quarantine" / name)
            else:
                (location / "quarantine" / name).remove()  # of an attempt that died just after it had written this
            (sibling / name).copy_to(location / name)
            present.add(name)
    return sorted(present)


def _compute(kind: str, location: Location, missing: list[tuple[str, ShardTask[Any]]], pool: Pool, unit: str) -> None:
    import ray.data

    tasks = [{"task": pickle.dumps((name, task.source))} for name, task in missing]
    wanted = pool.num_cpus * (pool.num_actors or 0)
    one = (pool.num_cpus, pool.num_gpus)
    connect(pool.num_cpus + 1, pool.num_gpus, why=pool.why, wanted_cpus=wanted + 1, one_process=one)
    # On a cluster Ray knows what there is room for, and its autoscaler what can be added.
    most = pool.num_actors or (num_cores() if is_embedded() else len(tasks))
    resources: dict[str, Any] = {"num_cpus": pool.num_cpus}
    if pool.num_gpus:
        resources["num_gpus"] = pool.num_gpus
    if pool.env:
        resources["runtime_env"] = {"env_vars": pool.env}
    worker = {
        "location": location,
        "build": pool.build,
        "arguments": pool.arguments,
        "streams": pool.together > 1,
        "isolates": pool.isolates,
        "stateless": pool.stateless,
        "run": uuid.uuid4().hex,
    }
    workers = min(most, len(tasks))
    together = min(pool.together, math.ceil(len(tasks) / workers))
    if pool.stateless:
        carried = {
            "fn": write_shards,
            "fn_kwargs": worker,
            "compute": ray.data.TaskPoolStrategy(size=workers),
        }
    else:
        carried = {
            "fn": ShardWorker,
            "fn_constructor_kwargs": worker,
            "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=workers, max_tasks_in_flight_per_actor=2),
        }
    results = ray.data.from_items(tasks, override_num_blocks=math.ceil(len(tasks) / together)).map_batches(
        **carried, batch_size=None, batch_format="pyarrow", **resources
    )
    results.context.target_max_block_size = 1  # byte: what is finished is told at once, and not with the whole batch
    progress = Progress(kind, sum(task.rows for _, task in missing), unit)
    rows = {name: task.rows for name, task in missing}
    say(kind, f"computing {len(missing)} shards, {progress.total} {unit}")
    try:
        for result in results.iter_rows():
            if result["failure"] is not None:
                raise pickle.loads(result["failure"])
            progress.advance(rows[result["name"]], note=f"shard {result['name'].removesuffix('.parquet')} done")
    except Exception as error:
        raise_ours(error, kind)
    for note in (location / NOTES).children():
        note.remove()  # of a process that was killed between its shard and the end of its note


def write_shards(batch: pa.Table, **worker: Any) -> Iterator[pa.Table]:
    """A task of a stateless pool: the arguments are ShardWorker's."""
    yield from ShardWorker(**worker)(batch)


class ShardWorker:
    """A worker of the pool: builds its function once, then writes the shards of each batch of tasks.

    Of each task it gives back the `name`, and the `failure` where there was one (dpo_ray.on_ray.failures).
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
    ):
        self.location = location
        self.streams = streams
        self.isolates = isolates
        self.run = run
        self.failure: bytes | None = None
        self._build = partial(build, **arguments)
        if stateless:
            return
        # Ray starts an actor that dies while it loads its model again, under the same id.
        building = Deaths(location / NOTES / f"worker-{_actor()}.json", f"to start {_named(build)}", run)
        try:
            with building.attempt():
                _ = self.work
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
            yield _told(name, self.failure or self._try(name, source))

    def _stream(self, tasks: list[tuple[str, Any]]) -> Iterator[pa.Table]:
        unfinished = {n: name for n, (name, _) in enumerate(tasks)}
        try:
            for name in unfinished.values():
                self._deaths(name).begin()
            for n, output in self.work.stream([source for _, source in tasks]):
                self._write(unfinished[n], output)
                self._deaths(unfinished[n]).end()
                yield _told(unfinished.pop(n), None)
        except Exception as error:
            failure = carried(error)
            for name in unfinished.values():
                self._deaths(name).end()
                yield _told(name, failure)

    def _try(self, name: str, source: Any) -> bytes | None:
        try:
            self._do(name, source)
        except Exception as error:
            return carried(error)
        return None

    def _do(self, name: str, source: Any) -> None:
        if not self.isolates:
            with self._deaths(name).attempt():
                self._write(name, self.work(source))
            return
        attempts = Attempts(self._note(name))
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
        self._write(name, output)
        attempts.clear()

    def _note(self, name: str) -> Location:
        return self.location / NOTES / f"{name.removesuffix('.parquet')}.json"

    def _deaths(self, name: str) -> Deaths:
        beside = "" if not self.streams else ", with others beside it"
        return Deaths(self._note(name), f"the shard {self.location / name}{beside}", self.run)

    def _write(self, name: str, output: ShardOutput) -> None:
        # The quarantine first: a shard that exists is finished, its quarantine included.
        quarantine = self.location / "quarantine" / name
        if output.quarantine is not None:
            write_shard(quarantine, output.quarantine, {})
        else:
            quarantine.remove()  # of an attempt that died just after it had written this
        write_shard(self.location / name, output.table, dict(output.counters))


def _actor() -> str:
    import ray

    found = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
    return found or "local"


def _named(build: Callable[..., Any]) -> str:
    """A function, a class, or a partial of one."""
    built = getattr(build, "func", build)
    return str(getattr(built, "__qualname__", built))


def _told(name: str, failure: bytes | None) -> pa.Table:
    return pa.table({"name": [name], "failure": pa.array([failure], pa.binary())})


def torch_pool(config: Config, build: Any, arguments: dict[str, Any]) -> Pool:
    """Actors with the trainer's forward, as many and as large as the training workers."""
    train = config.train
    return Pool(
        build=build,
        arguments=arguments,
        num_actors=train.num_workers,
        num_cpus=train.cpus_per_worker,
        num_gpus=1 if train.use_gpu else 0,
        why="train.num_workers, train.cpus_per_worker, train.use_gpu, and one CPU to read and write",
    )
