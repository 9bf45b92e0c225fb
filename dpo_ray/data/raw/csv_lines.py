"""CSV and TSV → lines of JSON, a row each: cells are text, and an empty one is null. The first row names the columns.

A row with another number of cells than the header is an array, and so no row of columns. A first column without a name
is the index that pandas writes unasked, and is left out.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator

from dpo_ray.data.raw.json_lines import MAX_LINE_BYTES, Bytes


def csv_lines(stream: Bytes, delimiter: str) -> Iterator[tuple[bytes, int]]:
    """The rows after the header as JSON lines, each with its bytes.

    Raises ValueError where there is no header, a column has no name or that of another one, or where a cell has no end.
    """
    # A quote that is never closed would have the rest of the file read as one cell.
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.TextIOWrapper(io.BufferedReader(_Raw(stream)), "utf-8-sig", "surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next((row for row in rows if row), None)  # a blank line is none
        if header is None:
            return
        names = header[1:] if header[0] == "" and len(header) > 1 else header
        if len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise ValueError(f"its first row has to name each column, by a name of its own, and is {header}")
        for row in rows:
            cells = [cell or None for cell in row]
            is_whole = len(cells) == len(header)
            value = dict(zip(names, cells[-len(names) :], strict=True)) if is_whole else cells
            if cells:
                # Bytes that are not UTF-8 stay what they are.
                line = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
                yield line[: MAX_LINE_BYTES + 1], len(line)
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from error


class _Raw(io.RawIOBase):
    """A stream of bytes as what Python reads text from."""

    def __init__(self, stream: Bytes):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
