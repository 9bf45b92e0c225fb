"""What a worker of the pool writes; no Ray is started."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa

from dpo_ray.on_ray.pool import ShardWorker
from dpo_ray.shards.score import MismatchShard
from dpo_ray.storage.artifact import read_shard
from dpo_ray.storage.location import Location
from tests.unit.shards.test_score import FOUR, Broken, shard


def test_a_worker_writes_the_quarantine_and_forgets_the_attempts(tmp_path: Path):
    source = shard(tmp_path / "in", FOUR)
    output = Location.of(tmp_path / "out")
    worker = ShardWorker(output, MismatchShard, {"scorer": Broken(1)}, isolates=True)
    batch = pa.table({"task": [pickle.dumps(("x.parquet", source))]})
    assert worker(batch)["name"].to_pylist() == ["x.parquet"]
    assert read_shard(output / "x.parquet").num_rows == 3
    assert read_shard(output / "quarantine" / "x.parquet").num_rows == 1
    assert (output / "attempts").children() == []
