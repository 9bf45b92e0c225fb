"""The rows of a pairs artifact that are left out, a bucket at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_ray.pairs import PreferencePair
from dpo_ray.shards.deduplicate import Bucket, DuplicatesShard, Group, RowIdsShard
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location
from tests.unit.data.test_duplicates import write as write_pairs


def question(text: str) -> tuple[Any, ...]:
    return ({"role": "user", "content": text},)


def test_the_rows_to_leave_out_are_found_over_all_shards_of_an_artifact(tmp_path: Path):
    pairs = [PreferencePair(question("Why?"), *sides) for sides in [("a", "b"), ("a", "b"), ("c", "d"), ("d", "c")]]
    places = write_pairs(tmp_path, [[(pair, "train") for pair in part] for part in (pairs[:1], pairs[1:])])
    ids = RowIdsShard()(Group(tuple(place.uri for place in places)))
    assert ids.counters == {"read": 4}
    write_shard(Location.of(tmp_path) / "ids.parquet", ids.table, {})
    output = DuplicatesShard()(Bucket((str(tmp_path / "ids.parquet"),), 0, 1))
    assert output.table.to_pylist() == [
        {"shard": "1.parquet", "row": row, "reason": reason}
        for row, reason in enumerate(["duplicate", "contradiction", "contradiction"])
    ]
    assert output.counters == {"read": 4, "kept": 1, "duplicate": 1, "contradiction": 2}
