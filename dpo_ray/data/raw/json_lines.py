"""JSON lines: bytes → lines → rows, or the reason why a line is none.

UTF-8, an object a line. A byte-order mark at the start of a line, and CRLF, do no harm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dpo_ray.data.rules import Reason

MAX_LINE_BYTES = 1 << 24
"""Of a longer line no more is held: no dialogue is that long."""
RAW_BOUND = 2000
"""Characters that are kept of a bad row."""
_CHUNK = 1 << 20
_MAX_NESTING = 100  # what reads a row later may recurse
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Bytes(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Unreadable:
    """A row that could not even be parsed."""

    reason: Reason
    raw: str
    """What stood there, with escapes for bytes that are no text; at most RAW_BOUND characters."""


def raw_lines(stream: Bytes, length: int | None = None) -> Iterator[tuple[bytes, int]]:
    """Lines of the next `length` bytes without their end, each with the bytes that it takes in the stream.

    The memory taken does not grow with a line: one over MAX_LINE_BYTES comes cut to a byte more than that.
    """
    held, size = b"", 0
    left = length
    while chunk := stream.read(_CHUNK if left is None else min(_CHUNK, left)):
        left = left if left is None else left - len(chunk)
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            line = held + piece if size else piece
            yield line[: MAX_LINE_BYTES + 1], size + len(piece) + 1
            held, size = b"", 0
        held += rest[: MAX_LINE_BYTES + 1 - len(held)]
        size += len(rest)
    if size:
        yield held, size


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing, and so counts as no row."""
    return not line.removeprefix(_BYTE_ORDER_MARK).strip()


def parse_line(line: bytes, columns: Collection[str] | None = None) -> dict[str, Any] | Unreadable:
    """The object in a line, or why there is none; of an object, the named columns only.

    NaN and Infinity, which are no JSON but which Python writes, are read as the floats they mean.
    """
    body = line.removeprefix(_BYTE_ORDER_MARK)
    if len(line) > MAX_LINE_BYTES:
        return _unreadable("too_long", body)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        return _unreadable("invalid_utf8", body)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return _unreadable("malformed_json", body)
    if not isinstance(row, dict):
        return _unreadable("not_an_object", body)
    if text.count("{") + text.count("[") > _MAX_NESTING and _nested_too_deep(row):
        return _unreadable("malformed_json", body)
    if columns is not None:
        row = {name: value for name, value in row.items() if name in columns}
    if _SURROGATE.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return _unreadable("invalid_unicode", body)
    return row


def _unreadable(reason: Reason, line: bytes) -> Unreadable:
    # No character takes more than four bytes, so that none of those kept is cut.
    return Unreadable(reason, line[: 4 * RAW_BOUND].decode("utf-8", "backslashreplace")[:RAW_BOUND])


def _nested_too_deep(row: dict[str, Any]) -> bool:
    level: list[Any] = [row]
    for _ in range(_MAX_NESTING):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [value for values in inner for value in values]
    return any(isinstance(value, dict | list) for value in level)
