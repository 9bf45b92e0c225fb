"""The rows of a part of a raw file, whatever kind of file it is, or the reason why one is none."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from dpo_ray.data.raw.arrow import arrow_batches
from dpo_ray.data.raw.files import Stamp, encoding_of, in_lines, open_lines, reading
from dpo_ray.data.raw.json_array import array_lines
from dpo_ray.data.raw.json_lines import Unreadable, is_blank, parse_line, raw_lines
from dpo_ray.data.raw.parquet import parquet_batches, parquet_rows
from dpo_ray.data.raw.parts import Part, RawPart
from dpo_ray.errors import DataError
from dpo_ray.storage.location import Location

_CHANGED = (
    "has changed since it was looked through. Leave input files alone while a run reads them, and start it again."
)


def read_rows(
    source: RawPart, columns: Collection[str] | None = None
) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """Rows of a part of a raw file, with their numbers, as Part.first has them.

    Args:
        columns: what is read of a row, where it is there; None: all.

    Blank lines are skipped and count as no rows. Memory does not grow with the file, but with the rows of Parquet's
    row groups and of Arrow's batches. Raises DataError naming the file where it is damaged, or has changed since it was
    cut into parts.
    """
    location, part = Location(source.file), source.part
    form = encoding_of(location.uri)
    if source.copy is not None:
        first = part.first if part else 0
        yield from _copied_rows(Location(source.copy), location, form.is_table, first, columns)
        return
    if source.stamp is not None and Stamp.of(location) != source.stamp:
        raise DataError(f"{location} {_CHANGED}")
    if form.kind == "arrow":
        for start, batch in arrow_batches(location, columns):
            yield from parquet_rows(location, batch, start)
        return
    if form.kind == "parquet":
        first, count = (part.first, part.rows) if part else (0, None)
        for start, batch in parquet_batches(location, first, count, columns):
            yield from parquet_rows(location, batch, start)
        return
    read = 0
    for number, line in _part_lines(location, part):
        if not is_blank(line):
            read += 1
            yield number, parse_line(line, columns)
    if part is not None and read != part.rows:
        raise DataError(f"{location} {_CHANGED}")


def _part_lines(location: Location, part: Part | None) -> Iterator[tuple[int, bytes]]:
    first = part.first if part else 1
    with reading(location, f"is damaged: its lines from {first} on cannot be read"):
        if part is None:
            with open_lines(location) as lines:
                for number, (line, _) in enumerate(lines, start=first):
                    yield number, line
            return
        is_array = in_lines(location) == "json"
        fs, path = location.filesystem()
        with fs.open_input_file(path) as file:
            file.seek(part.offset)
            lines = array_lines(file, part.length, inside=first > 1) if is_array else raw_lines(file, part.length)
            for number, (line, _) in enumerate(lines, start=first):
                yield number, line


def _copied_rows(
    place: Location, location: Location, is_table: bool, first: int, columns: Collection[str] | None
) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    try:
        for start, batch in parquet_batches(place, 0, None, columns if is_table else None):
            if is_table:
                yield from parquet_rows(place, batch, first + start)
                continue
            for number, line in zip(batch["line"].to_pylist(), batch["raw"].to_pylist(), strict=True):
                yield number, parse_line(line, columns)
    except DataError as error:
        folder = place.uri.rsplit("/", 1)[0]
        raise DataError(
            f"The copy that was made of {location} cannot be read: {error} This file is the run's own: remove the "
            f"folder {folder}, and the next run makes it again."
        ) from error
