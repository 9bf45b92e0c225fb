"""The parts that a raw file is cut into, and copies of parts that cannot be read where they are."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from dpo_ray.data.raw.files import Stamp
from dpo_ray.data.raw.json_lines import is_blank
from dpo_ray.storage.location import Location

RowsPerShard = int | Literal["auto"]
"""data.rows_per_shard"""

PART_BYTES = 1 << 26
"""A part ends early at this size: a part is held in memory while its copy is written."""
_FEWEST_BYTES = 1 << 17
_PARTS_OF_FILE = 16  # enough for the workers of one machine; whoever has more has more files


class Part(NamedTuple):
    """Rows that make up one unit of work."""

    first: int
    """Number of the first row: 0-based rows of Parquet and Arrow; 1-based lines of text (blank ones count here), rows
    of CSV behind its header, elements of arrays."""
    rows: int
    """How many there are; blank lines are none."""
    offset: int = 0
    """Where the part begins in plain JSON lines or in a plain array, in bytes."""
    length: int = 0
    """Bytes of the part in plain JSON lines or in a plain array."""


@dataclass(frozen=True)
class RawPart:
    """Where the rows of a part of a raw file are read."""

    file: str
    """URI of the raw file."""
    part: Part | None = None
    """None: the whole file."""
    copy: str | None = None
    """URI of the copy of the part; None: the part is read from the file itself."""
    stamp: Stamp | None = None
    """The file as it must still be; None: it may have changed."""


_LIST = "parts.json"
_PARTS = TypeAdapter(list[Part])


class Limit(NamedTuple):
    """Where a part ends: at so many rows, or with the row that reaches so many bytes."""

    rows: float
    num_bytes: int

    @classmethod
    def of(cls, rows_per_shard: RowsPerShard, file_bytes: int) -> Limit:
        """For a file of this size: by itself alone, so that other files change nothing of how it is cut."""
        if rows_per_shard != "auto":
            return cls(rows_per_shard, PART_BYTES)
        return cls(math.inf, min(max(file_bytes // _PARTS_OF_FILE, _FEWEST_BYTES), PART_BYTES))

    def rows_of(self, rows: int, num_bytes: int) -> int:
        """Rows of a part where so many rows take so many bytes; as many as were asked for, if any were."""
        if self.rows < math.inf:
            return int(self.rows)
        return max(1, min(rows, rows * self.num_bytes // max(1, num_bytes)))


def cut_lines(lines: Iterable[tuple[bytes, int]], limit: Limit) -> Iterator[Part]:
    """The parts of json_lines.raw_lines, or of their like, in order; no part is of blank lines alone."""
    first, count, offset, length = 1, 0, 0, 0
    for number, (line, size) in enumerate(lines, start=1):
        if count == limit.rows or (count and length >= limit.num_bytes):
            yield Part(first, count, offset, length)
            first, count, offset, length = number, 0, offset + length, 0
        count += not is_blank(line)
        length += size
    if count:
        yield Part(first, count, offset, length)


def line_tables(lines: Iterable[tuple[bytes, int]], limit: Limit) -> Iterator[tuple[int, pa.Table]]:
    """The lines that are rows, with their numbers, part by part; with each the number of its first."""
    numbers: list[int] = []
    held: list[bytes] = []
    size = 0

    def table() -> tuple[int, pa.Table]:
        raw = pa.array(held, pa.large_binary())
        return numbers[0], pa.table({"line": pa.array(numbers, pa.int64()), "raw": raw})

    for number, (line, _) in enumerate(lines, start=1):
        if is_blank(line):
            continue
        if len(held) == limit.rows or size >= limit.num_bytes:
            yield table()
            numbers, held, size = [], [], 0
        numbers.append(number)
        held.append(line)
        size += len(line)
    if held:
        yield table()


def row_tables(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[tuple[int, pa.Table]]:
    """The rows part by part; with each the number of its first."""
    first, held, count, size = 0, [], 0, 0
    for batch in batches:
        while batch.num_rows:
            piece = batch.slice(0, rows - count)
            batch = batch.slice(piece.num_rows)
            held.append(piece)
            count += piece.num_rows
            size += piece.nbytes
            if count == rows or size >= PART_BYTES:
                yield first, pa.Table.from_batches(held)
                first, held, count, size = first + count, [], 0, 0
    if held:
        yield first, pa.Table.from_batches(held)


def copy_parts(tables: Iterable[tuple[int, pa.Table]], folder: Location) -> list[Part]:
    """Write each part as a file of its own, and their list last. If there is a list already, nothing is read."""
    listed = folder / _LIST
    if listed.exists():
        return _PARTS.validate_json(listed.read_bytes())
    parts = []
    for number, (first, table) in enumerate(tables):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        part_file(folder, number).write_bytes(buffer.getvalue())
        parts.append(Part(first, table.num_rows))
    listed.write_bytes(_PARTS.dump_json(parts))
    return parts


def copy_is_finished(folder: Location) -> bool:
    """Whether copy_parts came to its end there."""
    return (folder / _LIST).exists()


def part_file(folder: Location, number: int) -> Location:
    """Where the copy of a part is."""
    return folder / f"part-{number:05d}.parquet"
