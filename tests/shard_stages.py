"""Stages of small shards whose workers run in the process that asks for them, without Ray."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.on_ray import pool
from dpo_ray.on_ray.pool import Pool, ShardTask, shard_stage
from dpo_ray.on_ray.shard_worker import ShardWorker
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.artifact import MANIFEST, Artifact
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import Finished

KIND = "counted"


class Rows:
    """So many rows; of an even number, one more that goes into quarantine."""

    def __call__(self, source: int) -> ShardOutput:
        quarantine = pa.table({"x": [source]}) if source % 2 == 0 else None
        counters = Counter(read=source + (quarantine is not None), bad=int(quarantine is not None))
        return ShardOutput(pa.table({"x": [source] * source}), counters, quarantine)


@contextmanager
def without_ray() -> Iterator[None]:
    def compute(
        kind: str, location: Location, missing: list[tuple[str, ShardTask]], workers: Pool, unit: str
    ) -> dict[str, Finished]:
        worker = ShardWorker(location, workers.build, workers.arguments, isolates=workers.isolates)
        return {name: worker.do(name, task.source) for name, task in missing}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_compute", compute)
        patch.setattr(pool, "_FEW", 1 << 20)  # nor for what a killed run has left
        yield


def stage(
    output: Location, rows: Sequence[int], *, kind: str = KIND, inputs: dict[str, str] | None = None, build: Any = Rows
) -> tuple[Artifact, bool]:
    """A shard of so many rows for each number."""
    tasks = [ShardTask(source=n, content=str(n), rows=n) for n in rows]
    named = {"rows": ", ".join(map(str, rows)), **(inputs or {})}
    with without_ray():
        return shard_stage(output, kind, identity={}, inputs=named, tasks=tasks, pool=Pool(build, {}))


def age(folder: Path, days: float) -> None:
    """Make all files below a folder so much older."""
    for file in folder.rglob("*"):
        if file.is_file():
            written = file.stat().st_mtime - days * 86400
            os.utime(file, (written, written))


def age_what_is_finished(output: Path, chance: random.Random) -> None:
    """Make half of the finished artifacts of an output folder, and of the shards, older than gc's bound.

    Not the claims of stages at work. None of these may take up an artifact again that was finished before.
    """
    finished = [manifest.parent for manifest in output.glob(f"artifacts/{KIND}/*/{MANIFEST}")]
    files = [file for folder in finished if chance.random() < 0.5 for file in folder.iterdir()]
    shards = [file for file in output.glob(f"artifacts/{KIND}/shards/**/*.parquet") if chance.random() < 0.5]
    for file in [*files, *shards]:
        with suppress(FileNotFoundError):
            os.utime(file, (1, 1))
