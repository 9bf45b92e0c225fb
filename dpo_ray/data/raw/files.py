"""Raw preference files: which formats there are, and how their bytes are read.

Parquet, and JSON lines (UTF-8, an object a line; a byte-order mark and CRLF do no harm), the latter plain or
compressed with gzip or Zstandard. The suffix tells which. A row that cannot be read costs itself only; a file that
cannot be read is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from dpo_ray.data.raw.json_lines import Bytes
from dpo_ray.errors import DataError, StorageError
from dpo_ray.storage.location import Location

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".parquet", *(lines + codec for lines in _LINES for codec in ("", *_CODECS)))
"""Files of a folder with these suffixes are taken. A file that is named itself may end in .json, too."""


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
def open_lines(location: Location) -> Iterator[Bytes]:
    """The bytes of a file of JSON lines, decompressed as they are read."""
    fs, path = location.filesystem()
    with fs.open_input_stream(path, compression=format_of(location.uri).codec) as stream:
        yield stream
