"""What a row-wise stage takes over and what it computes again; the workers run in this process."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.errors import DataError
from dpo_ray.on_ray import pool
from dpo_ray.on_ray.pool import Pool, ShardTask, ShardWorker, shard_stage
from dpo_ray.shards.output import ShardOutput
from dpo_ray.shards.score import MismatchShard
from dpo_ray.storage.artifact import Artifact, read_shard
from dpo_ray.storage.location import Location
from tests.unit.shards.test_score import FOUR, Broken, shard

TASKS = [ShardTask(source={"rows": n}, content=f"{n} rows", rows=n) for n in (1, 2, 3)]


class Count:
    """n rows of a source; of 2 rows, a third that goes into quarantine."""

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        n = source["rows"]
        quarantine = pa.table({"x": [9]}) if n == 2 else None
        return ShardOutput(pa.table({"x": list(range(n))}), Counter(read=n, bad=int(n == 2)), quarantine)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the shards that were computed, in order."""
    done: list[int] = []

    def compute(kind: str, location: Location, missing: list[tuple[str, ShardTask]], pool: Pool, unit: str) -> None:
        worker = ShardWorker(location, pool.build, pool.arguments)
        for name, task in missing:
            worker._do(name, task.source)
            done.append(task.rows)

    monkeypatch.setattr(pool, "_compute", compute)
    return done


def stage(output: Path, tasks: list[ShardTask] = TASKS) -> tuple[Artifact, bool]:
    inputs = {"rows": ", ".join(task.content for task in tasks)}
    return shard_stage(
        Location.of(output), "counted", identity={"seed": 0}, inputs=inputs, tasks=tasks, pool=Pool(Count, {})
    )


def test_a_finished_artifact_is_taken_over_and_shards_of_others_are_too(tmp_path: Path, computed: list[int]):
    first, reused = stage(tmp_path, TASKS[:2])
    assert (computed, reused, first.manifest.counters) == ([1, 2], False, {"read": 3, "bad": 1, "kept": 3})
    more, reused = stage(tmp_path)
    assert (computed, reused, more.manifest.counters) == ([1, 2, 3], False, {"read": 6, "bad": 1, "kept": 6})
    assert stage(tmp_path) == (more, True)
    assert len(computed) == 3


@pytest.mark.parametrize("lost", ["shard", "quarantine"])
def test_only_what_was_lost_is_made_again_also_after_an_attempt_that_failed(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch, lost: str
):
    artifact, _ = stage(tmp_path)
    [quarantine] = [f.name for f in artifact.manifest.files if f.name.startswith("quarantine/")]
    artifact.file(quarantine if lost == "quarantine" else quarantine.removeprefix("quarantine/")).remove()

    def fail(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(pool, "_compute", fail)
        stage(tmp_path)
    again, reused = stage(tmp_path)
    assert (computed, reused) == ([1, 2, 3, 2], False)
    assert again.manifest.files == artifact.manifest.files
    assert again.manifest.counters == artifact.manifest.counters


def test_a_worker_writes_the_quarantine_and_forgets_the_attempts(tmp_path: Path):
    source = shard(tmp_path / "in", FOUR)
    output = Location.of(tmp_path / "out")
    worker = ShardWorker(output, MismatchShard, {"scorer": Broken(1)}, isolates=True)
    batch = pa.table({"task": [pickle.dumps(("x.parquet", source))]})
    assert [told["name"].to_pylist() for told in worker(batch)] == [["x.parquet"]]
    assert read_shard(output / "x.parquet").num_rows == 3
    assert read_shard(output / "quarantine" / "x.parquet").num_rows == 1
    assert (output / "attempts").children() == []


class Streaming:
    """Rows of several sources at once: the last is finished first, and one of 0 rows fails."""

    def stream(self, sources: list[dict[str, Any]]) -> Iterator[tuple[int, ShardOutput]]:
        for n, source in reversed(list(enumerate(sources))):
            if not source["rows"]:
                raise DataError("no rows")
            yield n, ShardOutput(pa.table({"x": [source["rows"]] * source["rows"]}), Counter(read=source["rows"]))


@pytest.mark.parametrize(("rows", "failed"), [([3, 1, 2], []), ([3, 1, 0, 2], ["0.parquet", "1.parquet", "2.parquet"])])
def test_shards_given_together_are_written_and_told_as_each_is_finished(tmp_path: Path, rows: list[int], failed: list):
    output = Location.of(tmp_path)
    worker = ShardWorker(output, Streaming, {}, streams=True)
    tasks = [pickle.dumps((f"{n}.parquet", {"rows": count})) for n, count in enumerate(rows)]
    told: dict[str, Any] = {}
    for table in worker(pa.table({"task": tasks})):
        [row] = table.to_pylist()
        assert (output / row["name"]).exists() == (row["failure"] is None)
        told[row["name"]] = row["failure"]
    assert len(told) == len(rows)
    assert [name for name, failure in told.items() if failure is not None] == failed
    for name in failed:
        assert str(pickle.loads(told[name])) == "no rows"
    for n, count in enumerate(rows):
        if f"{n}.parquet" not in failed:
            assert read_shard(output / f"{n}.parquet")["x"].to_pylist() == [count] * count


def test_a_streaming_worker_that_cannot_be_built_says_so_of_each_task(tmp_path: Path):
    worker = ShardWorker(Location.of(tmp_path), MismatchShard, {"no_such": 1}, streams=True)
    tasks = [pickle.dumps((f"{n}.parquet", {})) for n in range(2)]
    told = [table.to_pylist()[0] for table in worker(pa.table({"task": tasks}))]
    assert [row["name"] for row in told] == ["0.parquet", "1.parquet"]
    assert all(row["failure"] is not None for row in told)
