"""Raw preference files: which kinds there are, and how their bytes are read.

Parquet; Arrow, as `datasets` saves it; and text: JSON lines (UTF-8, an object a line; a byte-order mark and CRLF do no
harm), arrays of JSON, CSV and TSV, each plain or compressed with gzip or Zstandard. The suffix tells which; whether a
file called .json is an array or lines, its first character. A row that cannot be read costs itself only; a file that
cannot be read is an error that names it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pyarrow as pa

from dpo_ray.data.raw.csv_lines import csv_lines
from dpo_ray.data.raw.json_array import array_lines, begins_array
from dpo_ray.data.raw.json_lines import Bytes, raw_lines
from dpo_ray.errors import DataError, StorageError
from dpo_ray.storage.location import Location

Kind = Literal["parquet", "arrow", "lines", "json", "csv", "tsv"]
"""`json`: lines or an array."""

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_TEXT: dict[str, Kind] = {".jsonl": "lines", ".ndjson": "lines", ".csv": "csv", ".tsv": "tsv"}
_JSON = ".json"


def _of(*kinds: str) -> tuple[str, ...]:
    return tuple(ending + codec for ending in kinds for codec in ("", *_CODECS))


SUFFIXES = (
    (".parquet", *_of(".jsonl", ".ndjson")),
    (".arrow",),
    _of(_JSON, ".csv", ".tsv"),
)
"""Of a folder are taken the files with the first of these suffixes that there are any of: beside data, files with the
later ones mostly describe them."""
_DESCRIBING = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json"})


_READ_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)


class Encoding(NamedTuple):
    """How the bytes of a file are to be taken."""

    kind: Kind
    codec: str | None
    """Compression around text, as pyarrow names it."""

    @property
    def is_table(self) -> bool:
        """Whether rows come in record batches, with types; else in lines."""
        return self.kind in {"parquet", "arrow"}


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
        # A file of a commit never changes, and each node has fetched it at a time of its own.
        return cls(location.uri, info.size, None if location.is_of_commit else info.mtime_ns)


def is_data(name: str) -> bool:
    """Whether a file of a folder may hold rows, and is neither a description nor a cache of `datasets`."""
    return name not in _DESCRIBING and not (name.startswith("cache-") and name.endswith(".arrow"))


def encoding_of(uri: str) -> Encoding:
    """The encoding that the name of a file tells. Raises DataError where it tells none."""
    name = (uri.partition("?")[0] if "://" in uri else uri).lower()  # there, the options of an object store follow
    if name.endswith(".parquet"):
        return Encoding("parquet", None)
    if name.endswith(".arrow"):
        return Encoding("arrow", None)
    suffix = next((suffix for suffix in _CODECS if name.endswith(suffix)), "")
    bare = name.removesuffix(suffix)
    for ending, kind in {**_TEXT, _JSON: "json"}.items():
        if bare.endswith(ending):
            return Encoding(kind, _CODECS.get(suffix))
    raise DataError(
        f"{uri} has none of the suffixes of preference files ({', '.join(itertools.chain(*SUFFIXES))}). Rename it by "
        "what is in it, or name the files of data.train and data.eval more closely."
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
def open_text(location: Location) -> Iterator[Bytes]:
    """The bytes of a file of text, decompressed as they are read."""
    fs, path = location.filesystem()
    with fs.open_input_stream(path, compression=encoding_of(location.uri).codec) as stream:
        yield stream


def in_lines(location: Location) -> Kind:
    """How a file of text is written: lines, csv, tsv, or an array (`json`)."""
    kind = encoding_of(location.uri).kind
    if kind != "json":
        return kind
    with open_text(location) as stream:
        return "json" if begins_array(stream) else "lines"


@contextmanager
def open_lines(location: Location) -> Iterator[Iterator[tuple[bytes, int]]]:
    """The rows of a file of text as JSON lines without their end, each with the bytes that it takes.

    Those of CSV are written as such lines, and take what these take. Raises ValueError where an array or a CSV cannot
    be read on.
    """
    kind = in_lines(location)
    with open_text(location) as stream:
        if kind == "json":
            yield array_lines(stream)
        elif kind in {"csv", "tsv"}:
            yield csv_lines(stream, "\t" if kind == "tsv" else ",")
        else:
            yield raw_lines(stream)
