"""Which rows later stages leave out, with workers in the process that asks for them."""

from __future__ import annotations

from pathlib import Path

from dpo_ray.config import parse_config
from dpo_ray.storage.artifact import publish, write_shard
from dpo_ray.storage.location import Location
from pipelines.context import RunContext
from pipelines.deduplicate import deduplicate, kept_tasks
from tests.shard_stages import without_ray
from tests.unit.data.test_duplicates import pair, table_of


def test_of_a_shard_that_was_made_again_the_same_rows_are_left_out(tmp_path: Path):
    output = Location.of(tmp_path / "out")
    config = parse_config({"run": {"name": "n", "output": output.uri}, "model": {"path": "m"}, "data": {"train": "t"}})
    context = RunContext(config, "run", output)
    table = table_of([(pair("Why?", "a", "b"), "train"), (pair("Why?", "a", "b"), "train")])
    left_out = []
    for name in ("first", "again"):  # of other bytes, and so of another name, under the same fingerprint
        file = write_shard(output / "pairs" / f"{name}.parquet", table, {name: 1})
        pairs = publish(output / "pairs", "pairs", identity={}, inputs={}, files=[file])
        with without_ray():
            [task] = kept_tasks(pairs, deduplicate(context, pairs))
        assert task.source.left_out is not None
        left_out.append(task.source.left_out.counts())
    assert left_out == [{"duplicate": 1}] * 2
