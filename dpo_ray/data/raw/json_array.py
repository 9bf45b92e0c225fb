"""An array of JSON → the bytes of its elements, as if each were a line: the array is never held whole.

Only brackets, quotes and commas are looked at here. What an element is worth is judged as of a line, so that a bad one
costs itself only. Elements are numbered from 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dpo_ray.data.raw.json_lines import MAX_LINE_BYTES, Bytes

_CHUNK = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_STRUCTURE = re.compile(rb'["\[\]{},]')
_REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def begins_array(stream: Bytes) -> bool:
    """Whether the first character that says anything opens an array."""
    first = True
    while chunk := stream.read(1 << 12):
        text = (chunk.removeprefix(_BYTE_ORDER_MARK) if first else chunk).lstrip(_SPACE)
        first = False
        if text:
            return text.startswith(b"[")
    return False


def array_lines(stream: Bytes, length: int | None = None, *, inside: bool = False) -> Iterator[tuple[bytes, int]]:
    """The elements of the next `length` bytes, each with the bytes that it takes in the stream, commas included.

    The memory taken does not grow with an element: one over MAX_LINE_BYTES comes cut to a byte more than that.

    Args:
        length: of whole elements; None: to the end of the array.
        inside: whether the stream stands behind the opening bracket.

    Raises ValueError where the array does not end as it should.
    """
    element = _Element()
    depth, in_string, escaped, closed, number = int(inside), False, False, False, 0
    left, at_start = length, not inside
    while chunk := stream.read(_CHUNK if left is None else min(_CHUNK, left)):
        left = left if left is None else left - len(chunk)
        place = begin = 0
        if at_start and chunk.startswith(_BYTE_ORDER_MARK):
            element.size, place, begin = len(_BYTE_ORDER_MARK), len(_BYTE_ORDER_MARK), len(_BYTE_ORDER_MARK)
        at_start = False
        while place < len(chunk):
            if in_string:
                place, in_string, escaped = _through_string(chunk, place, escaped)
                continue
            found = _STRUCTURE.search(chunk, place)
            if closed or found is None:
                if closed and chunk[place : len(chunk) if found is None else found.end()].strip(_SPACE):
                    raise ValueError(f"something follows the closing bracket, after {number} elements")
                break
            place, sign = found.end(), found.group()
            if sign == b'"':
                in_string = True
            elif sign in b"[{":
                depth += 1
                if depth == 1:  # of the array itself
                    element.size, begin = element.size + place - begin, place
            elif sign in b"]}":
                depth -= 1
                closed = depth == 0
            if closed or (sign == b"," and depth == 1):
                number += 1
                yield element.ended(chunk[begin : place - 1], 1)
                begin = place
        element.add(chunk[begin:])
    if length is None and not closed:
        raise ValueError(f"it ends after {number} elements, without its closing bracket")
    if length is not None and element.size:
        yield element.ended(b"", 0)


def _through_string(chunk: bytes, place: int, escaped: bool) -> tuple[int, bool, bool]:
    """Where a string ends in a chunk: the place behind it, whether it goes on, and then whether by an escape."""
    place += escaped
    found = _REST_OF_STRING.match(chunk, place)
    if found is not None:
        return found.end(), False, False
    rest = chunk[place:]
    return len(chunk), True, (len(rest) - len(rest.rstrip(b"\\"))) % 2 == 1


class _Element:
    """What was read of an element so far."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.held = self.size = 0

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        piece = piece[: MAX_LINE_BYTES + 1 - self.held]
        self.held += len(piece)
        if piece:
            self.pieces.append(piece)

    def ended(self, piece: bytes, more: int) -> tuple[bytes, int]:
        """The element with its last piece; and its size, with what ends it."""
        self.add(piece)
        line, size = b"".join(self.pieces).strip(_SPACE), self.size + more
        self.pieces, self.held, self.size = [], 0, 0
        return line, size
