"""Workers of stages: which processes they are."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.on_ray.pool import Pool, ShardTask, shard_stage
from dpo_ray.on_ray.session import disconnect
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.artifact import MANIFEST, Artifact, read_shard
from dpo_ray.storage.location import Location

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("no_ray")]


class ProcessShard:
    """A shard is the id of the process that made it, and the number of its task."""

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        return ShardOutput(pa.table({"process": [os.getpid()], "task": [source["task"]]}), {})


@pytest.mark.parametrize("stateless", [True, False])
def test_stages_share_processes_where_their_workers_keep_nothing(tmp_path: Path, monkeypatch, stateless: bool):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def stage(kind: str) -> set[int]:
        tasks = [ShardTask(source={"task": n}, content=f"{kind} {n}", rows=1) for n in range(6)]
        pool = Pool(ProcessShard, {}, stateless=stateless)
        made, reused = shard_stage(Location.of(tmp_path), kind, identity={}, inputs={}, tasks=tasks, pool=pool)
        rows = [row for shard in made.shards() for row in read_shard(shard).to_pylist()]
        assert not reused and [row["task"] for row in rows] == list(range(6))
        return {row["process"] for row in rows}

    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            first, second = stage("first"), stage("second")
    finally:
        disconnect()
    # What Ray will take away; it points at the line that uses it.
    assert not [str(w.message) for w in told if "dpo_ray" in w.filename and issubclass(w.category, DeprecationWarning)]
    assert os.getpid() not in first | second
    assert bool(first & second) == stateless


def test_many_shards_that_a_killed_run_has_left_are_looked_at_by_workers(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    output = Location.of(tmp_path)
    tasks = [ShardTask(source={"task": n}, content=str(n), rows=1) for n in range(20)]

    def stage() -> tuple[Artifact, bool]:
        pool = Pool(ProcessShard, {}, stateless=True)
        return shard_stage(output, "left", identity={}, inputs={}, tasks=tasks, pool=pool)

    try:
        first, _ = stage()
        (first.location / MANIFEST).remove()
        first.shards()[7].write_bytes(b"PAR1")
        again, reused = stage()
    finally:
        disconnect()
    said = capfd.readouterr().err
    assert "[left] looking at 20 shards that an unfinished run has left" in said
    assert "[left] 19 of 20 shards are finished already, 1 to compute" in said
    entries = [[entry for n, entry in enumerate(made.manifest.files) if n != 7] for made in (first, again)]
    assert not reused and entries[0] == entries[1] and stage() == (again, True)
