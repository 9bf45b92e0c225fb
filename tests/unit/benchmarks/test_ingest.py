"""The pure parts of benchmarks/ingest.py."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.ingest import MemoryWatch, random_rows, slope, write_set
from dpo_ray.data.canonical import canonical_pair


def test_random_rows_are_valid_pairs_of_the_wanted_size():
    rows = list(random_rows(100_000))
    texts = [part[0]["content"] for row in rows for part in row.values()]
    assert 100_000 <= sum(map(len, texts)) < 110_000
    assert len({canonical_pair(row).pair_id for row in rows}) == len(rows)
    assert list(islice(random_rows(100_000), 5)) == rows[:5]
    assert list(islice(random_rows(100_000, seed=1), 5)) != rows[:5]


def test_a_set_is_whole_and_counted(tmp_path: Path):
    write_set(tmp_path / "set", 50_000)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "set").glob("*.parquet"))]
    assert sum(table.num_rows for table in tables) == json.loads((tmp_path / "set" / "rows.json").read_text())
    assert [row for table in tables for row in table.to_pylist()] == list(random_rows(50_000))


def test_slope_of_a_line_and_of_points_around_it():
    assert slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert slope([(0, 0), (1, 2), (2, 1)]) == pytest.approx(0.5)  # covariance 1, variance 2


def test_memory_of_this_process_is_seen():
    with MemoryWatch() as memory:
        held = bytearray(50 * 2**20)
        memory._stop.wait(1.5)
        assert len(held) == 50 * 2**20
    assert memory.peak_all >= memory.peak_one > 50 * 2**20
