"""Rows of Arrow files, as `datasets` saves them: record batches one after the other, read from the first one on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pyarrow as pa

from dpo_ray.data.raw.files import reading
from dpo_ray.data.raw.parquet import ROWS_AT_ONCE
from dpo_ray.storage.location import Location

_FILE_MAGIC = b"ARROW1"


@contextmanager
def open_arrow(location: Location) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Schema and batches of a file, in either of Arrow's two forms. Raises DataError naming it."""
    fs, path = location.filesystem()
    with reading(location, "is not a readable Arrow file"):
        stream = fs.open_input_file(path)
    with stream:
        with reading(location, "is not a readable Arrow file"):
            schema, batches = _opened(stream)
        yield schema, batches


def _opened(stream: pa.NativeFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    magic = stream.read(len(_FILE_MAGIC))
    stream.seek(0)
    if magic == _FILE_MAGIC:
        file = pa.ipc.open_file(stream)
        return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
    opened = pa.ipc.open_stream(stream)
    return opened.schema, iter(opened)


def arrow_batches(location: Location, columns: Collection[str] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """All rows, a few at once, with the number of the first of them."""
    with open_arrow(location) as (schema, batches):
        wanted = None if columns is None else [name for name in schema.names if name in columns]
        first = 0
        while True:
            with reading(location, f"is damaged: its rows from {first} on cannot be read"):
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate()
            batch = batch if wanted is None else batch.select(wanted)
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                piece = batch.slice(start, ROWS_AT_ONCE)
                yield first + start, piece
            first += batch.num_rows
