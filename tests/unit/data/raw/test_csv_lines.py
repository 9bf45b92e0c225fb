"""CSV and TSV as lines of JSON."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.data.raw.csv_lines import csv_lines
from dpo_ray.data.raw.json_lines import MAX_LINE_BYTES, parse_line

CELL = st.text(st.sampled_from('ab",;\t\n\r é"'), max_size=5)


def rows(data: bytes, delimiter: str = ",") -> list[object]:
    return [parse_line(line) for line, _ in csv_lines(io.BytesIO(data), delimiter)]


@given(st.lists(st.tuples(CELL, CELL, CELL), max_size=6), st.sampled_from(",\t"))
def test_any_cells_come_back_and_an_empty_one_is_null(cells: list[tuple[str, ...]], delimiter: str):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([("prompt", "chosen", "rejected"), *cells])
    expected = [dict(zip(("prompt", "chosen", "rejected"), [c or None for c in row], strict=True)) for row in cells]
    assert rows(text.getvalue().encode(), delimiter) == expected


def test_a_byte_order_mark_crlf_and_blank_lines_do_no_harm():
    assert rows(b"\n\r\na,b\nx,1\n") == [{"a": "x", "b": "1"}]
    assert rows(b"\n\n") == []
    assert rows(b'\xef\xbb\xbfa,b\r\n"x\r\ny",1\r\n\r\n,\r\n') == [{"a": "x\r\ny", "b": "1"}, {"a": None, "b": None}]


def test_a_row_that_is_bad_costs_itself_only():
    found = rows(b"a,b\n1\n\xff,2\n3,4\n5,6,7\n")
    assert [getattr(row, "reason", row) for row in found] == [
        "not_an_object",
        "invalid_utf8",
        {"a": "3", "b": "4"},
        "not_an_object",
    ]
    assert json.loads(found[0].raw) == ["1"]  # type: ignore[attr-defined]


def test_the_index_that_pandas_writes_is_left_out():
    assert rows(b",a,b\n0,1,2\n1,3,\n") == [{"a": "1", "b": "2"}, {"a": "3", "b": None}]


@pytest.mark.parametrize("data", [b"", b"a,b", b"a,b\n"])
def test_without_rows_there_is_none(data: bytes):
    assert rows(data) == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"a,a\n1,2", "name each column"),
        (b"a,\n1,2", "name each column"),
        (b",\n1,2", "name each column"),
        (b'a\n"x', "line 2: unexpected end of data"),
        (b'a\n"x" y\n', "line 2: "),
        (b'a\n"' + b"x" * (MAX_LINE_BYTES + 1), "field larger than field limit"),
    ],
)
def test_what_cannot_be_read_on_is_an_error(data: bytes, why: str):
    with pytest.raises(ValueError, match=why):
        rows(data)
