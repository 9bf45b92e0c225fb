"""Pairs of earlier rounds: a share of their training rows, and nothing that is held out."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from dpo_ray.pairs import GENERATED_PAIRS
from dpo_ray.shards.replay import Earlier, ReplayShard
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location


def shard(folder: Path, count: int) -> str:
    rows = [{"pair_id": f"{n:016x}", "split": "eval" if n % 4 == 0 else "train"} for n in range(count)]
    location = Location.of(folder) / "pairs.parquet"
    write_shard(location, pa.Table.from_pylist(rows, schema=GENERATED_PAIRS), {})
    return location.uri


def test_a_share_of_the_training_rows_is_kept_by_their_hash(tmp_path: Path):
    file = shard(tmp_path, 4000)
    kept = {}
    for share in (0.0, 0.25, 0.5):
        output = ReplayShard()(Earlier(file, share, "round 2"))
        assert set(output.table["split"].to_pylist()) <= {"train"}
        assert output.counters["read"] == 4000 == output.counters["not_replayed"] + output.table.num_rows
        kept[share] = set(output.table["pair_id"].to_pylist())
    assert not kept[0.0] and 650 < len(kept[0.25]) < 850 and kept[0.25] < kept[0.5]
    other = set(ReplayShard()(Earlier(file, 0.25, "round 3")).table["pair_id"].to_pylist())
    assert other != kept[0.25]


def test_the_rounds_own_pairs_are_all_kept(tmp_path: Path):
    output = ReplayShard()(Earlier(shard(tmp_path, 40), 1.0, ""))
    assert output.table.num_rows == 40 and output.counters == {"read": 40}
