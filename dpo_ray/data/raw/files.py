"""Raw preference files: which formats there are, and how the rows of a part of a file are read.

Parquet, and JSON lines (UTF-8, an object a line; a byte-order mark and CRLF do no harm), the latter plain or
compressed with gzip or Zstandard. The suffix tells which. A row that cannot be read costs itself only; a file that
cannot be read is an error that names it. raw_scan cuts files into parts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.data.raw.json_lines import RAW_BOUND, Bytes, Unreadable, is_blank, parse_line, raw_lines
from dpo_ray.errors import DataError, StorageError
from dpo_ray.storage.location import Location

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".parquet", *(lines + codec for lines in _LINES for codec in ("", *_CODECS)))
"""What a folder's files of preferences are called. A file that is named itself may be called .json, too."""

ROWS_AT_ONCE = 64
"""Of Parquet, for row groups may be large."""
_CHANGED = (
    "has changed since it was looked through. Leave input files alone while a run reads them, and start it again."
)
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)


class Format(NamedTuple):
    """How the bytes of a file are to be taken."""

    is_parquet: bool
    codec: str | None
    """Compression around JSON lines, as pyarrow names it."""


@dataclass(frozen=True)
class Stamp:
    """A file as its folder lists it: what changes when the file is written again."""

    uri: str
    size: int
    mtime_ns: int | None

    @classmethod
    def of(cls, location: Location) -> Stamp:
        """Raises DataError where there is no such file."""
        fs, path = location.filesystem()
        with reading(location, "cannot be read"):
            info = fs.get_file_info(path)
        if not info.is_file:
            raise DataError(
                f"{location} is not there any more. Put it back, or take it out of data.train and data.eval."
            )
        return cls(location.uri, info.size, info.mtime_ns)


def format_of(uri: str) -> Format:
    """The format that the name of a file tells. Raises DataError where it tells none."""
    name = uri.partition("?")[0] if "://" in uri else uri  # there, the options of an object store follow
    if name.endswith(".parquet"):
        return Format(True, None)
    suffix = next((suffix for suffix in _CODECS if name.endswith(suffix)), "")
    if name.removesuffix(suffix).endswith((*_LINES, ".json")):
        return Format(False, _CODECS.get(suffix))
    raise DataError(
        f"{uri} has none of the suffixes of preference files ({', '.join(SUFFIXES)}). Rename it by what is in it, or "
        "name the files of data.train and data.eval more closely."
    )


@contextmanager
def reading(location: Location, what: str) -> Iterator[None]:
    """Errors of reading become a DataError: `location` `what` (why)."""
    try:
        yield
    except StorageError:  # it says nothing of the file itself
        raise
    except _READ_ERRORS as error:
        location.raise_for_store(error)
        raise DataError(
            f"{location} {what} ({' '.join(str(error).split())}). Write it again, or take it out of data.train and "
            "data.eval; it is not passed over silently."
        ) from error


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


@contextmanager
def open_lines(location: Location) -> Iterator[Bytes]:
    """The bytes of a file of JSON lines, decompressed as they are read."""
    fs, path = location.filesystem()
    with fs.open_input_stream(path, compression=format_of(location.uri).codec) as stream:
        yield stream


def read_rows(
    source: dict[str, Any], columns: Collection[str] | None = None
) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """Rows of a part of a raw file, with their numbers: 0-based rows of Parquet, 1-based lines of JSON lines.

    Args:
        source: `file`, the raw file; `first` and `count`, the part: rows of Parquet, or the first line's number and
            the rows. Left out, they mean the whole file. Of plain JSON lines also `offset` and `length`, the bytes
            of the part; `copy`, where the rows of the part were copied; `size` and `mtime_ns`, as they must still be.
        columns: what is read of a row, where it is there; None: all.

    Blank lines are skipped and count as no rows. Memory does not grow with the file, but with the rows of Parquet's
    row groups. Raises DataError naming the file where it is damaged, or has changed since it was cut into parts.
    """
    location = Location(source["file"])
    is_parquet = format_of(location.uri).is_parquet
    first, count = source.get("first", 0 if is_parquet else 1), source.get("count")
    if "copy" in source:
        yield from _copied_rows(Location(source["copy"]), location, is_parquet, first, columns)
        return
    if "size" in source and Stamp.of(location) != Stamp(location.uri, source["size"], source["mtime_ns"]):
        raise DataError(f"{location} {_CHANGED}")
    if is_parquet:
        for start, batch in _parquet_batches(location, first, count, columns):
            yield from _parquet_rows(location, batch, start)
        return
    read = 0
    for number, line in _part_lines(location, source.get("offset"), source.get("length"), first):
        if not is_blank(line):
            read += 1
            yield number, parse_line(line, columns)
    if count is not None and read != count:
        raise DataError(f"{location} {_CHANGED}")


def _part_lines(location: Location, offset: int | None, length: int | None, first: int) -> Iterator[tuple[int, bytes]]:
    with reading(location, f"is damaged: its lines from {first} on cannot be read"):
        if offset is None:
            with open_lines(location) as stream:
                for number, (line, _) in enumerate(raw_lines(stream), start=first):
                    yield number, line
            return
        fs, path = location.filesystem()
        with fs.open_input_file(path) as file:
            file.seek(offset)
            for number, (line, _) in enumerate(raw_lines(file, length), start=first):
                yield number, line


def _parquet_batches(
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


def _parquet_rows(
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
        [values] = row.to_pylist()
    except UnicodeDecodeError:
        legible = {name: _legible(row.column(i)[0]) for i, name in enumerate(row.schema.names)}
        return Unreadable("invalid_utf8", json.dumps(legible, ensure_ascii=False, default=str)[:RAW_BOUND])
    return values


def _copied_rows(
    place: Location, location: Location, is_parquet: bool, first: int, columns: Collection[str] | None
) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    try:
        for start, batch in _parquet_batches(place, 0, None, columns if is_parquet else None):
            if is_parquet:
                yield from _parquet_rows(place, batch, first + start)
                continue
            for number, line in zip(batch["line"].to_pylist(), batch["raw"].to_pylist(), strict=True):
                yield number, parse_line(line, columns)
    except DataError as error:
        folder = place.uri.rsplit("/", 1)[0]
        raise DataError(
            f"The copy that was made of {location} cannot be read: {error} This file is the run's own: remove the "
            f"folder {folder}, and the next run makes it again."
        ) from error


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
