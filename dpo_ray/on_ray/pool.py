"""Row-wise stages: every shard is a task of its own, carried by Ray Data to a pool of workers.

A worker writes its shard itself into the pool of its kind (dpo_ray.storage.shard_pool), atomically and under a name
that says what it was made from, and tells the driver what the manifest needs of it. So a run that is killed loses the
shards in flight and no others, a stage over more input computes only what is new, and no shard is copied or read again.
"""

from __future__ import annotations

import math
import pickle
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

from dpo_ray.config import Config, NodeChoice
from dpo_ray.config.placement import ANYWHERE
from dpo_ray.data.tally import dropped_by_reason
from dpo_ray.errors import DataError
from dpo_ray.on_ray.failures import raise_ours
from dpo_ray.on_ray.metrics import (
    DROPPED,
    ROWS,
    SHARDS_LEFT,
    TOKENS,
    at_work,
    count,
    tell,
    tell_progress,
)
from dpo_ray.on_ray.room import Need
from dpo_ray.on_ray.session import connect, is_embedded, num_cores
from dpo_ray.on_ray.shard_worker import ISOLATED, NOTES, ShardWorker, inspect_shards, write_shards
from dpo_ray.on_ray.usage import used
from dpo_ray.progress import Progress, say
from dpo_ray.shards.output import Shard
from dpo_ray.storage.artifact import SCHEMA_VERSION, Artifact, Contents, FileEntry, digest, make, read_manifest
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import Finished, Present, ShardPool, finished_in, has_quarantine

_FEW = 16  # shards that the driver inspects by itself, side by side, rather than starting Ray

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

    build: Callable[..., Any]
    """Class of the worker, a shard_worker.ShardFunction; built once in each actor with `arguments`."""
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
    place: NodeChoice = ANYWHERE
    """Nodes of the workers, and of the tasks that look at what an unfinished run has left of their shards."""
    why: str = "a worker, and one CPU to read and write"
    """The configuration keys behind these numbers."""

    @property
    def need(self) -> Need:
        """Of one worker, and a CPU to read and write: with those the stage comes to its end."""
        wanted = self.num_cpus * (self.num_actors or 0) + 1
        return Need(self.why, cpus=self.num_cpus, gpus=self.num_gpus, beside=1, wanted_cpus=wanted, place=self.place)


COMPUTED = "computed"
"""Among the metrics of an artifact of shards: Computed."""


@dataclass(frozen=True)
class Computed:
    """What the run that made an artifact computed of it itself, and did not take over: for who plans the next one."""

    rows: int
    shards: int
    seconds: float
    """From the first task to the last, the start of Ray and of the workers included."""
    workers: int
    """Side by side, at most."""
    cpus: float
    """Of each worker."""
    gpus: float


def shard_tasks(artifact: Artifact) -> list[ShardTask[Shard]]:
    """One task for each shard of a finished artifact."""
    return [
        ShardTask(source=Shard(artifact.file(f.name).uri), content=f.sha256, rows=f.rows)
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
    # A name covers all that a shard depends on, so that other artifacts of the kind can take it over.
    names = [digest([kind, SCHEMA_VERSION, identity, task.content]) for task in tasks]

    def compute(location: Location) -> Contents:
        found = _take_over(kind, location, set(names), pool)
        missing = [(n, t) for n, t in dict(zip(names, tasks, strict=True)).items() if n not in found]
        say(kind, f"{len(found)} of {len(set(names))} shards are finished already, {len(missing)} to compute")
        began = time.monotonic()
        if missing:
            found |= _compute(kind, location, missing, pool, unit)
        computed = Computed(
            rows=sum(task.rows for _, task in missing),
            shards=len(missing),
            seconds=round(time.monotonic() - began, 1),
            workers=min(_most(pool, len(missing)), len(missing)),
            cpus=pool.num_cpus,
            gpus=pool.num_gpus,
        )
        return replace(_contents([found[name] for name in dict.fromkeys(names)]), metrics={COMPUTED: asdict(computed)})

    artifact, reused = make(output, kind, identity, inputs, compute, tasks=names, makes_lost=True)
    if reused:
        say(kind, f"reused: {artifact.manifest.counters['kept']} rows in {artifact.location}")
    return artifact, reused


def _contents(finished: Sequence[Finished]) -> Contents:
    """Of these shards, with their quarantines and the sum of their counters."""
    counters: Counter[str] = Counter()
    for one in finished:
        counters.update(one.shard.counters)
    if "kept" not in counters:  # a stage whose rows are not those that it keeps counts them itself
        counters["kept"] = sum(one.shard.rows or 0 for one in finished)
    quarantines: list[FileEntry] = [one.quarantine for one in finished if one.quarantine is not None]
    return Contents(files=[*(one.shard for one in finished), *quarantines], counters=dict(sorted(counters.items())))


def _take_over(kind: str, location: Location, wanted: set[str], pool: Pool) -> dict[str, Finished]:
    """The finished shards of these tasks, by task.

    Of several of a task the newest manifest's is taken: what was made of it since is made already. Of those that no
    manifest tells of, which a killed run has left, it is the first by name, so that runs at the same time come to the
    same.

    Args:
        location: the artifact's own folder.
        pool: of the stage. Where it isolates, rows in quarantine are those that an engine failed on: only the artifact
            that set them aside takes such a shard up again, and another one tries these rows anew.
    """
    shards = ShardPool(location.parent)
    present = shards.present()
    found = {one.task: one for one in _own(location, present) if one.task in wanted and present.holds(one)}
    left = {task: present.by_task[task] for task in wanted & present.by_task.keys() - found.keys()}
    if pool.isolates:
        left = {task: [n for n in names if not has_quarantine(n, present.files)] for task, names in left.items()}
        left = {task: names for task, names in left.items() if names}
    for folder in present.manifests:
        if not left:
            return found
        for one in _finished_in(folder):
            if one.shard.name in left.get(one.task, ()) and present.holds(one):
                found[one.task] = one
                del left[one.task]
    names = [name for task in left for name in left[task]]
    looked_at = [(name, has_quarantine(name, present.files)) for name in sorted(names)]
    for inspected in _inspect(kind, shards, looked_at, pool.place):
        if inspected is not None:
            found.setdefault(inspected.task, inspected)
    return found


def _own(location: Location, present: Present) -> list[Finished]:
    """What the artifact's own manifest tells, where it has lost files, or the notes of its earlier attempts."""
    notes = [file for file in present.beside.get(location.name, ()) if file.parent.name == ISOLATED]
    with ThreadPoolExecutor(_FEW) as threads:
        noted = [Finished.model_validate_json(note) for note in threads.map(Location.read_bytes, notes)]
    return noted + (_finished_in(location) if location in present.manifests else [])


def _finished_in(folder: Location) -> list[Finished]:
    try:
        return finished_in(read_manifest(folder))
    except (DataError, FileNotFoundError):  # it is told of when that artifact itself is asked for; gc may remove it
        return []


def _inspect(
    kind: str, shards: ShardPool, names: list[tuple[str, bool]], place: NodeChoice
) -> Iterator[Finished | None]:
    """What shards are that no manifest tells of, in the order of their names."""
    if not names:
        return
    say(kind, f"looking at {len(names)} shards that an unfinished run has left")
    if len(names) <= _FEW:
        with ThreadPoolExecutor(_FEW) as threads:
            yield from threads.map(lambda name: shards.inspect(*name), names)
        return
    found: dict[str, Finished | None] = {}
    tasks = [{"task": pickle.dumps(name)} for name in names]
    work = {"fn": inspect_shards, "fn_kwargs": {"shards": shards}}
    pool = Pool(inspect_shards, {}, stateless=True, together=_FEW, place=place)
    for result in _results(kind, tasks, pool, work):
        found[result["name"]] = result["finished"] and Finished.model_validate_json(result["finished"])
    yield from (found[name] for name, _ in names)


def _compute(
    kind: str, location: Location, missing: list[tuple[str, ShardTask[Any]]], pool: Pool, unit: str
) -> dict[str, Finished]:
    """Have workers make these tasks' shards. location: the artifact's own folder."""
    tasks = [{"task": pickle.dumps((name, task.source))} for name, task in missing]
    run = uuid.uuid4().hex
    worker = {
        "location": location,
        "build": pool.build,
        "arguments": pool.arguments,
        "streams": pool.together > 1,
        "isolates": pool.isolates,
        "stateless": pool.stateless,
        "run": run,
        "at": at_work(),
    }
    if pool.stateless:
        work = {"fn": write_shards, "fn_kwargs": worker}
    else:
        work = {"fn": ShardWorker, "fn_constructor_kwargs": worker}
    progress = Progress(kind, sum(task.rows for _, task in missing), unit, parts=len(missing))
    rows = {name: task.rows for name, task in missing}
    say(kind, f"computing {len(missing)} shards, {progress.total} {unit}")
    found: dict[str, Finished] = {}
    tell(SHARDS_LEFT, len(missing), artifact=kind)
    for result in _results(kind, tasks, pool, work):
        name = result["name"]
        found[name] = Finished.model_validate_json(result["finished"])
        progress.advance(rows[name], shard=name)
        _tell_of(kind, rows[name], found[name].shard.counters, left=len(missing) - len(found))
    for note in (location / NOTES).children():
        if note.name.startswith(run):
            note.remove()  # of a process that was killed between its shard and the end of its note
    return found


def _tell_of(kind: str, rows: int, counters: dict[str, int], left: int) -> None:
    """The metrics of a shard that is finished."""
    count(ROWS, rows, artifact=kind)
    count(TOKENS, counters.get("tokens", 0), artifact=kind)
    for reason, number in dropped_by_reason(counters).items():
        count(DROPPED, number, artifact=kind, reason=reason)
    tell(SHARDS_LEFT, left, artifact=kind)
    tell_progress()


def _results(kind: str, tasks: list[dict[str, bytes]], pool: Pool, work: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a pool's workers tell of each task, as they finish it. Raises what one of them gave back as its failure."""
    import ray.data

    connect(pool.need)
    resources: dict[str, Any] = {"num_cpus": pool.num_cpus, **pool.place.options}
    if pool.num_gpus:
        resources["num_gpus"] = pool.num_gpus
    if pool.env:
        resources["runtime_env"] = {"env_vars": pool.env}
    workers = min(_most(pool, len(tasks)), len(tasks))
    used(workers, pool.num_gpus)
    together = min(pool.together, math.ceil(len(tasks) / workers))
    if pool.stateless:
        work |= {"compute": ray.data.TaskPoolStrategy(size=workers)}
    else:
        actors = ray.data.ActorPoolStrategy(min_size=1, max_size=workers, max_tasks_in_flight_per_actor=2)
        work |= {"compute": actors}
    results = ray.data.from_items(tasks, override_num_blocks=math.ceil(len(tasks) / together)).map_batches(
        **work, batch_size=None, batch_format="pyarrow", **resources
    )
    results.context.target_max_block_size = 1  # byte: what is finished is told at once, and not with the whole batch
    try:
        for result in results.iter_rows():
            if result["failure"] is not None:
                raise pickle.loads(result["failure"])
            yield result
    except Exception as error:
        raise_ours(error, kind)


def _most(pool: Pool, tasks: int) -> int:
    """Workers at most. On a cluster Ray knows what there is room for, and its autoscaler what can be added."""
    return pool.num_actors or (num_cores() if is_embedded() else tasks)


def rows_pool(config: Config, build: Any, arguments: dict[str, Any], *, stateless: bool = True) -> Pool:
    """Workers that only carry rows, of one CPU each. Args: stateless: as in Pool."""
    return Pool(build, arguments, stateless=stateless, place=config.placement.data)


def torch_pool(config: Config, build: Any, arguments: dict[str, Any]) -> Pool:
    """Actors with the trainer's forward, as many and as large as the training workers."""
    train = config.train
    return Pool(
        build=build,
        arguments=arguments,
        num_actors=train.num_workers,
        num_cpus=train.cpus_per_worker,
        num_gpus=1 if train.use_gpu else 0,
        place=config.placement.training,
        why="train.num_workers, train.cpus_per_worker, train.use_gpu, and one CPU to read and write",
    )
