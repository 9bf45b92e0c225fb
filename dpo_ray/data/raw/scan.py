"""A first look at raw files, and their scan, which cuts them into parts.

A look reads a footer and the first rows. A scan reads all of a file: it hashes the content and finds the parts. Some
files cannot be read from the middle: compressed text, CSV, Arrow, and Parquet with row groups much larger than a part.
The scan copies them, a file for each part. The memory of both does not grow with the file.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_ray.data.raw.arrow import arrow_batches, open_arrow
from dpo_ray.data.raw.files import Encoding, Stamp, encoding_of, in_lines, open_lines, open_text, reading
from dpo_ray.data.raw.json_array import array_lines
from dpo_ray.data.raw.json_lines import Unreadable, is_blank, parse_line, raw_lines
from dpo_ray.data.raw.parquet import ROWS_AT_ONCE, open_parquet, parquet_rows
from dpo_ray.data.raw.parts import (
    Limit,
    Part,
    RawPart,
    RowsPerShard,
    copy_is_finished,
    copy_parts,
    cut_lines,
    line_tables,
    part_file,
    row_tables,
)
from dpo_ray.errors import DataError
from dpo_ray.formats.format import cut
from dpo_ray.storage.artifact import digest, file_hash
from dpo_ray.storage.location import Location

VERSION = 3
"""Of what a scan writes; raised when that changes, and all files are scanned again."""
_SAMPLE_LINES = 64  # lines that a first look reads to learn the columns
_SAMPLE_ROWS = 16  # rows that a first look keeps
# Parquet is copied where a row group holds more rows than this many parts: every part reads whole row groups.
_OVERREAD = 4
# Parquet is copied where its parts would read more footers than this, in bytes, and more than _OVERREAD times the file.
_FOOTER_BYTES = 1 << 28
_EXPANDS = 4  # compressed text, about
_SIDE_BY_SIDE = 16  # threads; they mostly wait for a disk or an object store
_LISTED = 10  # bad files that one message names
_MAX_TYPE = 200  # characters of a type in a message
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Peek:
    """What a first look at a file tells."""

    columns: tuple[str, ...]
    """Of JSON lines: the names that the first objects have."""
    unusable: dict[str, str]
    """Column whose type holds neither text nor messages → the type. JSON lines have no types."""
    has_rows: bool
    sample: tuple[dict[str, Any], ...] = ()
    """The first rows that can be read, with long values cut: of tables without columns that hold bytes or times."""


class FileRecord(BaseModel):
    """What a scan found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    size: int
    mtime_ns: int | None
    sha256: str
    """Of the file's bytes."""
    columns: tuple[str, ...]
    unusable: dict[str, str]
    sample: tuple[dict[str, Any], ...]
    parts: tuple[Part, ...]
    copied_to: str | None
    """Name of the folder beside the records that holds a file for each part; None where the file itself is read."""

    @property
    def has_rows(self) -> bool:
        return bool(self.parts)

    def sources(self, folder: Location) -> Iterator[tuple[Part, RawPart]]:
        """Each part, and where its rows are read. folder: where the records are."""
        stamp = Stamp(self.uri, self.size, self.mtime_ns)
        for number, part in enumerate(self.parts):
            if self.copied_to is None:
                yield part, RawPart(self.uri, part, stamp=stamp)
            else:
                yield part, RawPart(self.uri, part, copy=part_file(folder / self.copied_to, number).uri)


def record_name(stamp: Stamp, rows_per_shard: RowsPerShard) -> str:
    """Name of the record of a file that is as its folder lists it."""
    return f"{digest([VERSION, stamp.uri, stamp.size, stamp.mtime_ns, rows_per_shard])}.json"


def peek(location: Location) -> Peek:
    """A footer and the first rows. Raises DataError where the file cannot hold a row."""
    form = encoding_of(location.uri)
    if form.kind == "parquet":
        with open_parquet(location, buffer_size=1 << 20, pre_buffer=False) as parquet:
            _require_distinct(location, parquet.schema_arrow)
            schema, columns = parquet.schema_arrow, _sampled(parquet.schema_arrow)
            batches = parquet.iter_batches(_SAMPLE_ROWS, columns=columns, use_threads=False)
            return _peek_at_table(location, schema, batches if parquet.metadata.num_rows else iter(()))
    if form.kind == "arrow":
        with open_arrow(location) as (schema, batches):
            _require_distinct(location, schema)
            return _peek_at_table(location, schema, (b.select(_sampled(schema)) for b in batches if b.num_rows))
    what = f"is not a readable file of {_CALLED[form.kind]}" + (f" compressed with {form.codec}" if form.codec else "")
    if form.codec is not None and Stamp.of(location).size == 0:
        raise DataError(
            f"{location} is empty, which a compressed file never is. Write it again, or take it out of data.train and "
            "data.eval; it is not passed over silently."
        )
    read, first, names, sample = 0, b"", dict[str, None](), list[dict[str, Any]]()
    with reading(location, what), open_lines(location) as numbered:
        lines = (line for line, _ in numbered if not is_blank(line))
        for line in itertools.islice(lines, _SAMPLE_LINES):
            first = line if read == 0 else first
            row = parse_line(line)
            read += 1
            if not isinstance(row, Unreadable):
                sample.append(row)
                names |= dict.fromkeys(row)
    is_array = form.kind == "lines" and first.strip().startswith(b"[")
    # Of an array over several lines, only its last element may look like a line.
    if read and (not sample or (is_array and first.strip() == b"[")):
        why = (
            "it is a JSON array: call it .json, or write it as such lines (jq -c '.[]')"
            if is_array
            else f"none of its first {read} rows is a JSON object; each holds one row, and text is in UTF-8"
        )
        raise DataError(
            f"{location} is not a file of {_CALLED[form.kind]}: {why}. Rename it by what is in it, or write it again."
        )
    return Peek(tuple(names), {}, read > 0, tuple(cut(row) for row in sample[:_SAMPLE_ROWS]))


_CALLED = {
    "lines": "JSON lines",
    "json": "JSON lines, nor a JSON array",
    "csv": "comma-separated values",
    "tsv": "tab-separated values",
}


def map_files(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """work(item) for each item, in order, on several threads. Raises one DataError that names all bad items."""
    results, bad = [], []
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as threads:
        for future in [threads.submit(work, item) for item in items]:
            try:
                results.append(future.result())
            except DataError as error:
                bad.append(str(error))
    if bad:
        raise one_error(bad)
    return results


def one_error(messages: Sequence[str]) -> DataError:
    """One error with all these messages, in one paragraph."""
    if len(messages) == 1:
        return DataError(messages[0])
    listed = [f"({number}) {message}" for number, message in enumerate(messages[:_LISTED], start=1)]
    rest = [f"And {len(messages) - _LISTED} more."] if len(messages) > _LISTED else []
    return DataError(" ".join([f"{len(messages)} files cannot be used.", *listed, *rest]))


def require_usable(found: Peek | FileRecord, columns: Collection[str], source: str) -> None:
    """Raises DataError where one of these columns is of a type that holds neither text nor messages."""
    bad = [f"{name} is {type_}" for name, type_ in found.unusable.items() if name in columns]
    if bad:
        raise DataError(
            f"{source} cannot hold preferences: its column {' and its column '.join(bad)}. Prompts and answers are "
            "strings, or lists of messages with the strings role and content: write it again so, or leave the file "
            "out of data.train and data.eval."
        )


def scan(stamp: Stamp, rows_per_shard: RowsPerShard, folder: Location) -> FileRecord:
    """Hash a file and cut it into parts as data.rows_per_shard says; copies go below `folder`.

    Raises DataError where the file is damaged, or is written to meanwhile.
    """
    location = Location(stamp.uri)
    found = peek(location)
    form = encoding_of(location.uri)
    if form.kind == "parquet":
        sha256, parts, copied_to = _scan_parquet(stamp, rows_per_shard, folder)
    elif form.kind == "arrow":
        sha256, parts, copied_to = _scan_arrow(stamp, rows_per_shard, folder)
    else:
        sha256, parts, copied_to = _scan_lines(stamp, form, rows_per_shard, folder)
    _require_unchanged(stamp)
    return FileRecord(
        uri=stamp.uri,
        size=stamp.size,
        mtime_ns=stamp.mtime_ns,
        sha256=sha256,
        columns=found.columns,
        unusable=found.unusable,
        sample=found.sample,
        parts=tuple(parts),
        copied_to=copied_to,
    )


def read_record(folder: Location, stamp: Stamp, rows_per_shard: RowsPerShard) -> FileRecord | None:
    """The record of a file; None where it must be scanned, also because its copy was removed. Raises DataError."""
    try:
        data = (folder / record_name(stamp, rows_per_shard)).read_bytes()
    except (FileNotFoundError, NotADirectoryError):  # of a run.output that is a file; whoever writes there says so
        return None
    try:
        record = FileRecord.model_validate_json(data)
    except ValidationError as error:
        raise DataError(
            f"{folder / record_name(stamp, rows_per_shard)} is not a valid record of {stamp.uri} "
            f"({error.error_count()} errors). Remove it; the file will then be looked through again."
        ) from error
    if record.copied_to is not None and not copy_is_finished(folder / record.copied_to):
        return None
    return record


def _scan_parquet(stamp: Stamp, rows_per_shard: RowsPerShard, folder: Location) -> tuple[str, list[Part], str | None]:
    location = Location(stamp.uri)
    with reading(location, "cannot be read"):
        sha256 = file_hash(location)
    # A row group is read as it comes, not fetched whole.
    with open_parquet(location, buffer_size=1 << 20, pre_buffer=False) as parquet:
        metadata = parquet.metadata
        rows = metadata.num_rows
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        with reading(location, "is damaged: its rows cannot be read"):
            decoded = _decoded(parquet, rows)
        text = max(sum(group.total_byte_size for group in groups), decoded)
        most = Limit.of(rows_per_shard, text).rows_of(rows, text)
        parts = [Part(first, min(most, rows - first)) for first in range(0, rows, most)]
        largest = max((group.num_rows for group in groups), default=0)
        footers = metadata.serialized_size * len(parts)
        small_groups = largest <= _OVERREAD * most
        if small_groups and footers <= max(_FOOTER_BYTES, _OVERREAD * Stamp.of(location).size):
            return sha256, parts, None
        tables = row_tables(parquet.iter_batches(ROWS_AT_ONCE, use_threads=False), most)
        return sha256, *_copied(_blaming_file(tables, stamp, "rows"), sha256, rows_per_shard, folder)


def _scan_arrow(stamp: Stamp, rows_per_shard: RowsPerShard, folder: Location) -> tuple[str, list[Part], str | None]:
    location = Location(stamp.uri)
    with reading(location, "cannot be read"):
        sha256 = file_hash(location)
    rows = text = 0
    for _, batch in arrow_batches(location):
        rows, text = rows + batch.num_rows, text + batch.nbytes
    if not rows:
        return sha256, [], None
    most = Limit.of(rows_per_shard, text).rows_of(rows, text)
    tables = row_tables((batch for _, batch in arrow_batches(location)), most)
    return sha256, *_copied(_blaming_file(tables, stamp, "rows"), sha256, rows_per_shard, folder)


def _decoded(parquet: pq.ParquetFile, rows: int) -> int:
    """Bytes of all rows in memory, by the first ones: what they all have, as a system prompt, is in a file but once."""
    first = next(parquet.iter_batches(ROWS_AT_ONCE, use_threads=False), None)
    return first.nbytes * rows // first.num_rows if first is not None and first.num_rows else 0


def _scan_lines(
    stamp: Stamp, form: Encoding, rows_per_shard: RowsPerShard, folder: Location
) -> tuple[str, list[Part], str | None]:
    location = Location(stamp.uri)
    limit = Limit.of(rows_per_shard, stamp.size if form.codec is None else _EXPANDS * stamp.size)
    with reading(location, "cannot be read"):
        kind = in_lines(location)
        if form.codec is None and kind in {"lines", "json"}:
            with open_text(location) as stream:
                hashed = _Hashed(stream)
                lines = array_lines(hashed) if kind == "json" else raw_lines(hashed)
                parts = list(cut_lines(lines, limit))
            return hashed.sha256.hexdigest(), parts, None
        sha256 = file_hash(location)
    with open_lines(location) as lines:
        tables = line_tables(lines, limit)
        return sha256, *_copied(_blaming_file(tables, stamp, "lines"), sha256, rows_per_shard, folder)


def _blaming_file(tables: Iterator[tuple[int, pa.Table]], stamp: Stamp, what: str) -> Iterator[tuple[int, pa.Table]]:
    """The tables. An error of reading them is blamed on the file; an error of writing them is not."""
    location = Location(stamp.uri)
    with reading(location, f"is damaged: its {what} cannot be read"):
        yield from tables
    # Before the copy counts as finished: its name is the hash of an earlier reading.
    _require_unchanged(stamp)


def _require_unchanged(stamp: Stamp) -> None:
    if Stamp.of(Location(stamp.uri)) != stamp:
        raise DataError(f"{stamp.uri} was written to while it was read. Start again when it is finished.")


def _copied(
    tables: Iterable[tuple[int, pa.Table]], sha256: str, rows_per_shard: RowsPerShard, folder: Location
) -> tuple[list[Part], str]:
    """The parts, and the name of their copy. It is a hash of the content, so that a moved file finds its copy."""
    name = digest([VERSION, sha256, rows_per_shard])
    return copy_parts(tables, folder / name), name


class _Hashed:
    """A stream that hashes what is read of it."""

    def __init__(self, stream: Any):
        self.stream, self.sha256 = stream, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data: bytes = self.stream.read(size)
        self.sha256.update(data)
        return data


def _peek_at_table(location: Location, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Peek:
    rows: list[dict[str, Any] | Unreadable] = []
    with reading(location, "is damaged: its first rows cannot be read"):
        for batch in batches:
            rows += [row for _, row in parquet_rows(location, batch.slice(0, _SAMPLE_ROWS - len(rows)), len(rows))]
            if len(rows) == _SAMPLE_ROWS:
                break
    unusable = {
        f.name: str(f.type)[:_MAX_TYPE] for f in schema if not _holds_text(f.type) and not _holds_messages(f.type)
    }
    sample = tuple(cut(row) for row in rows if not isinstance(row, Unreadable))
    return Peek(tuple(schema.names), unusable, bool(rows), sample)


def _require_distinct(location: Location, schema: pa.Schema) -> None:
    """Raises DataError where columns share a name: of a row, one of them would be read, and which one by chance."""
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise DataError(
            f"{location} has several columns called {twice[0]}, so that it cannot be told which is meant. Write it "
            "again with a name for each, or take it out of data.train and data.eval."
        )


def _sampled(schema: pa.Schema) -> list[str]:
    """The columns that can say anything of what rows are."""
    return [field.name for field in schema if _is_plain(field.type)]


def _is_plain(type_: pa.DataType) -> bool:
    """Whether Python has values of this type that JSON has too."""
    if isinstance(type_, pa.BaseExtensionType):
        return _is_plain(type_.storage_type)
    if pt.is_dictionary(type_):
        return _is_plain(type_.value_type)
    if pt.is_struct(type_):
        return all(_is_plain(type_.field(i).type) for i in range(type_.num_fields))
    if pt.is_list(type_) or pt.is_large_list(type_) or pt.is_fixed_size_list(type_) or pt.is_list_view(type_):
        return _is_plain(type_.value_type)
    return bool(_holds_text(type_) or pt.is_boolean(type_) or pt.is_integer(type_) or pt.is_floating(type_))


def _holds_text(type_: pa.DataType) -> bool:
    """Whether values are strings; a column of nulls alone is judged row by row."""
    if isinstance(type_, pa.BaseExtensionType):
        return _holds_text(type_.storage_type)
    if pt.is_dictionary(type_):
        return _holds_text(type_.value_type)
    return bool(pt.is_string(type_) or pt.is_large_string(type_) or pt.is_string_view(type_) or pt.is_null(type_))


def _holds_messages(type_: pa.DataType) -> bool:
    """Whether values are lists of structs with the strings role and content."""
    if not (pt.is_list(type_) or pt.is_large_list(type_) or pt.is_fixed_size_list(type_) or pt.is_list_view(type_)):
        return False
    message = type_.value_type
    if pt.is_null(message):
        return True
    names = [message.field(i).name for i in range(message.num_fields)] if pt.is_struct(message) else []
    return all(name in names and _holds_text(message.field(name).type) for name in ("role", "content"))
