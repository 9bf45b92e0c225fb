"""Cutting raw files into parts."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.data.raw import parts as raw_parts
from dpo_ray.data.raw.json_lines import is_blank, raw_lines
from dpo_ray.data.raw.parts import (
    PART_BYTES,
    Limit,
    Part,
    copy_is_finished,
    copy_parts,
    cut_lines,
    line_tables,
    part_file,
    row_tables,
)
from dpo_ray.storage.location import Location

PIECES = st.sampled_from([b'{"a": 1}', b"{", b"\xff", b"\n", b"\n", b"\r\n", b" ", b"\xef\xbb\xbf", b'"\\ud800"'])
FILES = st.binary() | st.lists(PIECES).map(b"".join)


def lines_of(data: bytes) -> list[tuple[bytes, int]]:
    return list(raw_lines(io.BytesIO(data)))


@given(data=FILES, rows=st.integers(1, 5))
def test_parts_of_lines_are_the_file_cut_between_lines(data: bytes, rows: int):
    parts = list(cut_lines(lines_of(data), Limit(rows, PART_BYTES)))
    assert all(part.rows == rows for part in parts[:-1])
    assert all(0 < part.rows <= rows for part in parts)
    assert sum(part.rows for part in parts) == sum(not is_blank(line) for line, _ in lines_of(data))
    for part, following in itertools.pairwise(parts):
        assert part.offset + part.length == following.offset
        assert data[following.offset - 1 : following.offset] == b"\n"
        assert data[: following.offset].count(b"\n") == following.first - 1
    if parts:
        assert (parts[0].first, parts[0].offset) == (1, 0)


@given(data=FILES, rows=st.integers(1, 5))
def test_copied_lines_are_the_rows_of_the_same_parts(data: bytes, rows: int):
    limit = Limit(rows, PART_BYTES)
    tables = [table for _, table in line_tables(lines_of(data), limit)]
    assert [table.num_rows for table in tables] == [part.rows for part in cut_lines(lines_of(data), limit)]
    copied = [(n, raw) for t in tables for n, raw in zip(t["line"].to_pylist(), t["raw"].to_pylist(), strict=True)]
    assert copied == [(n, line) for n, (line, _) in enumerate(lines_of(data), start=1) if not is_blank(line)]


@given(sizes=st.lists(st.integers(0, 7), max_size=6), rows=st.integers(1, 5))
def test_copied_rows_are_in_parts_of_one_size_whatever_the_batches(sizes: list[int], rows: int):
    numbers = iter(range(100))
    batches = [pa.record_batch({"n": pa.array(list(itertools.islice(numbers, size)), pa.int64())}) for size in sizes]
    found = list(row_tables(batches, rows))
    assert [first for first, _ in found] == list(range(0, sum(sizes), rows))
    assert [n for _, table in found for n in table["n"].to_pylist()] == list(range(sum(sizes)))
    assert all(table.num_rows == rows for _, table in found[:-1])


def test_a_part_ends_early_where_its_rows_are_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(raw_parts, "PART_BYTES", 20)
    lines = lines_of(b"x" * 30 + b"\n" + b"y\n" * 3)
    limit = Limit.of(10, 1 << 40)
    assert list(cut_lines(lines, limit)) == [Part(1, 1, 0, 31), Part(2, 3, 31, 6)]
    assert [table.num_rows for _, table in line_tables(lines, limit)] == [1, 3]
    batch = pa.record_batch({"a": ["x" * 30, "y"]})
    tables = row_tables([batch.slice(0, 1), batch.slice(1), batch.slice(1)], 10)
    assert [(first, table.num_rows) for first, table in tables] == [(0, 1), (1, 2)]


def test_a_finished_copy_is_taken_over_and_an_unfinished_one_is_not(tmp_path: Path):
    folder = Location.of(tmp_path) / "copy"
    read: list[int] = []

    def tables(fail: bool = False) -> Any:
        for first in (0, 2):
            if fail and first:
                raise OSError("gone")
            read.append(first)
            yield first, pa.table({"a": [first, first + 1]})

    with pytest.raises(OSError, match="gone"):
        copy_parts(tables(fail=True), folder)
    assert not copy_is_finished(folder)
    parts = copy_parts(tables(), folder)
    assert parts == [Part(0, 2), Part(2, 2)]
    assert copy_is_finished(folder)
    assert pq.read_table(part_file(folder, 1).uri).to_pydict() == {"a": [2, 3]}
    assert copy_parts(tables(), folder) == parts
    assert read == [0, 0, 2]


@pytest.mark.parametrize(
    ("file_bytes", "num_bytes"), [(0, 1 << 17), (1 << 20, 1 << 17), (1 << 24, 1 << 20), (1 << 40, 1 << 26)]
)
def test_how_a_file_is_cut_by_itself_follows_from_its_size_alone(file_bytes: int, num_bytes: int):
    limit = Limit.of("auto", file_bytes)
    assert limit.num_bytes == num_bytes
    lines = [(b"x" * 1000, 1000)] * 4000
    parts = list(cut_lines(lines, limit))
    assert sum(part.rows for part in parts) == 4000
    # Each but the last ends with the line that reaches the limit.
    assert all(num_bytes <= part.length < num_bytes + 1000 for part in parts[:-1])
    assert [part.length for part, _ in zip(parts, range(3), strict=False)] == [
        sum(len(raw) for raw in table["raw"].to_pylist()) for _, table in itertools.islice(line_tables(lines, limit), 3)
    ]


@pytest.mark.parametrize(
    ("rows", "num_bytes", "expected"), [(1000, 1 << 17, 1000), (1000, 1 << 24, 62), (3, 1 << 40, 1), (0, 0, 1)]
)
def test_rows_of_parquet_are_as_many_as_take_the_bytes(rows: int, num_bytes: int, expected: int):
    assert Limit.of("auto", num_bytes).rows_of(rows, num_bytes) == expected
    assert Limit.of(7, num_bytes).rows_of(rows, num_bytes) == 7
