"""Rows of raw preference files."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.errors import DataError
from dpo_ray.quality import Reason
from dpo_ray.storage import Location


@dataclass(frozen=True)
class Unreadable:
    """A row that could not even be parsed."""

    reason: Reason
    raw: str


def read_rows(
    source: dict[str, Any], columns: Collection[str] | None = None
) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """Rows [first, first + count) of a Parquet file, with their numbers; of the `columns` those that it has.

    Raises DataError naming the file.
    """
    location, first, count = Location(source["file"]), source.get("first", 0), source.get("count", 1 << 62)
    fs, path = location.filesystem()
    try:
        with fs.open_input_file(path) as stream:
            parquet = pq.ParquetFile(stream)
            present = parquet.schema_arrow.names
            wanted = [c for c in present if columns is None or c in columns]
            start = 0
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                if start < first + count and start + size > first:
                    table = parquet.read_row_group(group, columns=wanted)
                    low, high = max(0, first - start), min(size, first + count - start)
                    yield from enumerate(table.slice(low, high - low).to_pylist(), start=start + low)
                start += size
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{location} is damaged: rows {first} to {first + count - 1} cannot be read ({error}). Write "
            "the file again, or take it out of data.train and data.eval."
        ) from error
