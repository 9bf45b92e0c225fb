"""What a row-wise stage takes over and what it computes again; the workers run in this process."""

from __future__ import annotations

import hashlib
import os
import pickle
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.errors import DataError
from dpo_ray.on_ray import pool
from dpo_ray.on_ray.pool import Pool, ShardTask, shard_stage
from dpo_ray.on_ray.shard_worker import ShardWorker
from dpo_ray.shards.output import ShardOutput
from dpo_ray.shards.score import MismatchShard
from dpo_ray.storage import artifact as artifact_module
from dpo_ray.storage.artifact import SCHEMA_VERSION, Artifact, digest, read_shard
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import Finished, ShardPool, finished_in
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

    def compute(
        kind: str, location: Location, missing: list[tuple[str, ShardTask]], pool: Pool, unit: str
    ) -> dict[str, Finished]:
        worker = ShardWorker(location, pool.build, pool.arguments, isolates=pool.isolates)
        done.extend(task.rows for _, task in missing)
        return {name: worker.do(name, task.source) for name, task in missing}

    monkeypatch.setattr(pool, "_compute", compute)
    return done


def stage(output: Path, tasks: list[ShardTask] = TASKS, workers: Pool = Pool(Count, {})) -> tuple[Artifact, bool]:
    inputs = {"rows": ", ".join(task.content for task in tasks)}
    return shard_stage(Location.of(output), "counted", identity={"seed": 0}, inputs=inputs, tasks=tasks, pool=workers)


def files_of(output: Path) -> dict[str, bytes]:
    """All files of the pool."""
    folder = output / "artifacts" / "counted" / "shards"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.parquet")}


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shard may be opened, and none copied."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a shard was opened or copied")

    monkeypatch.setattr(ShardPool, "inspect", refuse)
    monkeypatch.setattr(Location, "copy_to", refuse)


def test_a_finished_artifact_is_taken_over_and_shards_of_others_are_too(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
):
    forbid(monkeypatch)
    first, reused = stage(tmp_path, TASKS[:2])
    assert (computed, reused, first.manifest.counters) == ([1, 2], False, {"read": 3, "bad": 1, "kept": 3})
    before = files_of(tmp_path)
    more, reused = stage(tmp_path)
    assert (computed, reused, more.manifest.counters) == ([1, 2, 3], False, {"read": 6, "bad": 1, "kept": 6})
    assert len(files_of(tmp_path)) == len(before) + 1 == 4  # each shard once, and a quarantine
    assert more.shards()[:2] == first.shards() and more.quarantines() == first.quarantines()
    assert stage(tmp_path) == (more, True)
    assert len(computed) == 3


def test_a_manifest_tells_of_each_file_what_is_in_it(tmp_path: Path, computed: list[int]):
    artifact, _ = stage(tmp_path)
    for entry in artifact.manifest.files:
        data = artifact.file(entry.name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert entry.rows == (None if "quarantine" in entry.name else read_shard(artifact.file(entry.name)).num_rows)
    assert [dict(one.shard.counters) for one in finished_in(artifact.manifest)] == [
        {"read": 1, "bad": 0},
        {"read": 2, "bad": 1},
        {"read": 3, "bad": 0},
    ]


@pytest.mark.parametrize("few", [16, 1])
def test_shards_of_a_killed_run_are_looked_at_and_damaged_ones_made_again(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch, few: int
):
    artifact, _ = stage(tmp_path)
    (artifact.location / "manifest.json").remove()
    damaged, whole = artifact.shards()[0], artifact.shards()[2]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-4])
    monkeypatch.setattr(pool, "_FEW", few)
    monkeypatch.setattr(pool, "_results", in_this_process)
    again, reused = stage(tmp_path)
    assert not reused and computed == [1, 2, 3, 1]
    assert again.manifest.files == artifact.manifest.files and again.manifest.counters == artifact.manifest.counters
    assert damaged.read_bytes() == content and whole.exists()


def in_this_process(kind: str, tasks: list[dict[str, bytes]], pool: Pool, work: dict[str, Any]) -> Iterator[dict]:
    for task in tasks:
        for table in work["fn"](pa.table({"task": [task["task"]]}), **work["fn_kwargs"]):
            [row] = table.to_pylist()
            if row["failure"] is not None:
                raise pickle.loads(row["failure"])
            yield row


@pytest.mark.parametrize("lost", ["shard", "quarantine"])
def test_only_what_was_lost_is_made_again_also_after_an_attempt_that_failed(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch, lost: str
):
    artifact, _ = stage(tmp_path)
    of_quarantine = artifact.quarantines()[0]
    (of_quarantine if lost == "quarantine" else artifact.shards()[1]).remove()
    forbid(monkeypatch) if lost == "shard" else None

    def fail(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(pool, "_compute", fail)
        stage(tmp_path)
    again, reused = stage(tmp_path)
    assert (computed, reused) == ([1, 2, 3, 2], False)
    assert again.manifest.files == artifact.manifest.files
    assert again.manifest.counters == artifact.manifest.counters


class Unsteady(Count):
    """Not the same numbers twice."""

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        output = super().__call__(source)
        noise = pa.array([uuid.uuid4().hex] * output.table.num_rows)
        return ShardOutput(output.table.append_column("noise", noise), output.counters, output.quarantine)


def test_a_lost_shard_that_comes_out_otherwise_makes_no_manifest_wrong(tmp_path: Path, computed: list[int]):
    workers = Pool(Unsteady, {})
    first, _ = stage(tmp_path, TASKS[:2], workers)
    more, _ = stage(tmp_path, TASKS, workers)
    first.shards()[0].remove()  # both lost it
    again, reused = stage(tmp_path, TASKS, workers)
    assert not reused and computed == [1, 2, 3, 1]
    assert again.shards()[1:] == more.shards()[1:] and again.shards()[0] != more.shards()[0]
    # The other one takes it over.
    mended, reused = stage(tmp_path, TASKS[:2], workers)
    assert not reused and len(computed) == 4 and mended.shards() == again.shards()[:2]
    for artifact in (again, mended):
        for entry in artifact.manifest.files:
            assert hashlib.sha256(artifact.file(entry.name).read_bytes()).hexdigest() == entry.sha256


def test_runs_at_once_that_get_other_numbers_leave_each_others_shards_alone(tmp_path: Path, computed: list[int]):
    place = Location.of(tmp_path / "artifacts" / "counted")
    [name] = [digest(["counted", SCHEMA_VERSION, {"seed": 0}, TASKS[0].content])]
    two = [ShardWorker(place / "other", Unsteady, {}).do(name, TASKS[0].source) for _ in range(2)]
    assert two[0].shard.name != two[1].shard.name
    artifact, _ = stage(tmp_path, TASKS[:1])
    assert not computed and artifact.manifest.files == [min((one.shard for one in two), key=lambda entry: entry.name)]


def test_what_a_newer_manifest_has_is_taken_before_an_older_one(tmp_path: Path, computed: list[int]):
    workers = Pool(Unsteady, {})
    older, _ = stage(tmp_path, TASKS[:1], workers)
    hidden = {file: file.read_bytes() for file in older.shards()}
    older.shards()[0].remove()
    newer, _ = stage(tmp_path, TASKS[:2], workers)
    for file, content in hidden.items():
        file.write_bytes(content)
    for n, artifact in enumerate((older, newer)):
        os.utime((artifact.location / "manifest.json").uri, (n, n))
    both, _ = stage(tmp_path, TASKS, workers)
    assert both.shards()[0] == newer.shards()[0] != older.shards()[0]


def test_rows_that_an_engine_failed_on_are_tried_again_by_others_and_not_by_the_same_artifact(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
):
    workers = Pool(CountAttempted, {}, isolates=True)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(artifact_module, "publish", killed)
        stage(tmp_path, TASKS[:2], workers)
    first, _ = stage(tmp_path, TASKS[:2], workers)  # the same goes on
    assert computed == [1, 2] and len(first.quarantines()) == 1
    more, _ = stage(tmp_path, TASKS, workers)  # another one has the row tried again, and takes the other shard over
    assert computed == [1, 2, 2, 3] and len(more.quarantines()) == 1
    # As a finished one that has lost another file, it keeps what it set aside.
    more.shards()[2].remove()
    stage(tmp_path, TASKS, workers)
    assert computed == [1, 2, 2, 3, 3]
    # Without its folder, nothing is known of what it did.
    first.location.remove_folder()
    stage(tmp_path, TASKS[:2], workers)
    assert computed == [1, 2, 2, 3, 3, 2]


class CountAttempted(Count):
    def __call__(self, source: dict[str, Any], attempts: Any = None) -> ShardOutput:
        return super().__call__(source)


def killed(*_: Any, **__: Any) -> None:
    raise RuntimeError("killed")


def test_a_worker_writes_the_quarantine_and_forgets_the_attempts(tmp_path: Path):
    source = shard(tmp_path / "in", FOUR)
    folder = Location.of(tmp_path / "kind" / "artifact")
    worker = ShardWorker(folder, MismatchShard, {"scorer": Broken(1)}, isolates=True)
    batch = pa.table({"task": [pickle.dumps(("x", source))]})
    [told] = [row for table in worker(batch) for row in table.to_pylist()]
    assert told["name"] == "x" and told["failure"] is None
    finished = Finished.model_validate_json(told["finished"])
    assert finished.quarantine is not None
    rows, quarantined = (read_shard(folder.parent / name) for name in finished.files)
    assert (rows.num_rows, quarantined.num_rows) == (3, 1)
    assert (folder / "attempts").children() == []


class Streaming:
    """Rows of several sources at once: the last is finished first, and one of 0 rows fails."""

    def stream(self, sources: list[dict[str, Any]]) -> Iterator[tuple[int, ShardOutput]]:
        for n, source in reversed(list(enumerate(sources))):
            if not source["rows"]:
                raise DataError("no rows")
            yield n, ShardOutput(pa.table({"x": [source["rows"]] * source["rows"]}), Counter(read=source["rows"]))


@pytest.mark.parametrize(("rows", "failed"), [([3, 1, 2], []), ([3, 1, 0, 2], ["0", "1", "2"])])
def test_shards_given_together_are_written_and_told_as_each_is_finished(tmp_path: Path, rows: list[int], failed: list):
    kind = Location.of(tmp_path)
    worker = ShardWorker(kind / "artifact", Streaming, {}, streams=True)
    tasks = [pickle.dumps((str(n), {"rows": count})) for n, count in enumerate(rows)]
    told: dict[str, Any] = {}
    for table in worker(pa.table({"task": tasks})):
        [row] = table.to_pylist()
        told[row["name"]] = row
        if row["failure"] is None:
            finished = Finished.model_validate_json(row["finished"])
            count = rows[int(row["name"])]
            assert finished.shard.counters == {"read": count} and finished.task == row["name"]
            assert read_shard(kind / finished.shard.name)["x"].to_pylist() == [count] * count
    assert len(told) == len(rows)
    assert [name for name, row in told.items() if row["failure"] is not None] == failed
    for name in failed:
        assert str(pickle.loads(told[name]["failure"])) == "no rows"


def test_a_streaming_worker_that_cannot_be_built_says_so_of_each_task(tmp_path: Path):
    worker = ShardWorker(Location.of(tmp_path) / "artifact", MismatchShard, {"no_such": 1}, streams=True)
    tasks = [pickle.dumps((str(n), {})) for n in range(2)]
    told = [table.to_pylist()[0] for table in worker(pa.table({"task": tasks}))]
    assert [row["name"] for row in told] == ["0", "1"]
    assert all(row["failure"] is not None for row in told)
