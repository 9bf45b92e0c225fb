"""Rows of Parquet, a few at once; a value that is not UTF-8 costs its row only."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.data.raw.files import reading
from dpo_ray.data.raw.json_lines import RAW_BOUND, Unreadable
from dpo_ray.storage.location import Location

ROWS_AT_ONCE = 64
"""Of Parquet, for row groups may be large."""


@contextmanager
def open_parquet(location: Location, **options: Any) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose footer is read. Raises DataError naming it."""
    fs, path = location.filesystem()
    with reading(location, "is not a readable Parquet file"):
        stream = fs.open_input_file(path)
    with stream:
        with reading(location, "is not a readable Parquet file"):
            parquet = pq.ParquetFile(stream, page_checksum_verification=True, **options)
        yield parquet


def parquet_batches(
    location: Location, first: int, count: int | None, columns: Collection[str] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Rows [first, first + count), a few at once, with the number of the first of them."""
    with open_parquet(location) as parquet:
        metadata = parquet.metadata
        end = metadata.num_rows if count is None else min(first + count, metadata.num_rows)
        groups, skipped, start = [], 0, 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if start < end and start + rows > first:
                groups.append(group)
            elif not groups:
                skipped += rows
            start += rows
        present = parquet.schema_arrow.names
        wanted = None if columns is None else [name for name in present if name in columns]
        with reading(location, f"is damaged: rows {first} to {end - 1} cannot be read"):
            start = skipped
            for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=wanted, use_threads=False):
                low, high = max(0, first - start), min(batch.num_rows, end - start)
                if low < high:
                    yield start + low, batch.slice(low, high - low)
                start += batch.num_rows


def parquet_rows(
    location: Location, batch: pa.RecordBatch, first: int
) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    with reading(location, f"holds values in rows {first} to {first + batch.num_rows - 1} that Python cannot hold"):
        try:
            rows: list[dict[str, Any] | Unreadable] = batch.to_pylist()
        except UnicodeDecodeError:
            # One string that is not UTF-8 fails the batch: each row is taken alone.
            rows = [_parquet_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
    yield from enumerate(rows, start=first)


def _parquet_row(row: pa.RecordBatch) -> dict[str, Any] | Unreadable:
    try:
        values: dict[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError:
        legible = {name: _legible(row.column(i)[0]) for i, name in enumerate(row.schema.names)}
        return Unreadable("invalid_utf8", json.dumps(legible, ensure_ascii=False, default=str)[:RAW_BOUND])
    return values


def _legible(value: pa.Scalar) -> Any:
    """A value of Parquet with escapes for bytes that are not UTF-8."""
    if not value.is_valid:
        return None
    if isinstance(value, pa.DictionaryScalar):
        return _legible(value.value)
    if isinstance(value, pa.StructScalar):
        return {name: _legible(inner) for name, inner in value.items()}
    if isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return [_legible(inner) for inner in value.values]
    if isinstance(value, pa.StringScalar | pa.LargeStringScalar | pa.StringViewScalar):
        return value.as_buffer().to_pybytes().decode("utf-8", "backslashreplace")
    return value.as_py()
