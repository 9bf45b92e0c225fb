"""Bytes → lines → rows."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.data.raw import json_lines
from dpo_ray.data.raw.json_lines import RAW_BOUND, Unreadable, is_blank, parse_line, raw_lines

SURROGATE = '{"chosen": "\\ud83d"}'


def lines_of(data: bytes, length: int | None = None) -> list[tuple[bytes, int]]:
    return list(raw_lines(io.BytesIO(data), length))


def reason(line: bytes, columns: set[str] | None = None) -> str | None:
    row = parse_line(line, columns)
    return row.reason if isinstance(row, Unreadable) else None


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a", [(b"a", 1)]),
        (b"a\n", [(b"a", 2)]),
        (b"\n\na\r\nb", [(b"", 1), (b"", 1), (b"a\r", 3), (b"b", 1)]),
    ],
)
def test_lines_end_with_a_line_feed_or_with_the_file(data: bytes, lines: list[tuple[bytes, int]]):
    assert lines_of(data) == lines


@given(data=st.lists(st.sampled_from([b"ab", b"\n", b"c", b"\r\n"])).map(b"".join), chunk=st.integers(1, 5))
def test_lines_are_the_same_however_the_bytes_arrive(data: bytes, chunk: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "_CHUNK", chunk)
        found = lines_of(data)
    ended = data.split(b"\n")
    assert [line for line, _ in found] == (ended if ended[-1] else ended[:-1])
    assert sum(size for _, size in found) == len(data)


def test_no_more_is_read_than_asked_for():
    stream = io.BytesIO(b"a\nbcd\ne")
    assert list(raw_lines(stream, 4)) == [(b"a", 2), (b"bc", 2)]
    assert stream.read() == b"d\ne"


@pytest.mark.parametrize("chunk", [3, 100])
def test_of_a_line_that_is_too_long_no_more_is_held_and_the_next_is_read(monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 8)
    monkeypatch.setattr(json_lines, "_CHUNK", chunk)
    long, exact, last = lines_of(b'{"a": "' + b"x" * 50 + b'"}\n{"a": 1}\n{"b"')
    assert long == (b'{"a": "xx', 60)
    assert reason(long[0]) == "too_long"
    assert parse_line(exact[0]) == {"a": 1}
    assert reason(last[0]) == "malformed_json"


@pytest.mark.parametrize("line", [b"", b"\r", b" \t\r", b"\xef\xbb\xbf", b"\xef\xbb\xbf \r"])
def test_a_line_of_white_space_is_no_row(line: bytes):
    assert is_blank(line)


def test_a_byte_order_mark_and_a_carriage_return_do_no_harm():
    assert parse_line(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r') == {"a": "é"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": "\xff"}', "invalid_utf8"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_utf8"),  # a surrogate as bytes
        (b'{"a": 1', "malformed_json"),
        (b"{'a': 1}", "malformed_json"),
        (b'{"a": 1} {"a": 2}', "malformed_json"),
        (b"[" * 100_000, "malformed_json"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "malformed_json"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "malformed_json"),
        (b"[1, 2]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"null", "not_an_object"),
        (SURROGATE.encode(), "invalid_unicode"),
        (b'{"\\udc00": 1}', "invalid_unicode"),
        (b'{"a": [{"content": "\\uD800 "}]}', "invalid_unicode"),
        (b'{"a": "\\ud83d\\ude00"}', None),
        (b'{"a": "\\\\ud800"}', None),
        (b'{"a": "\\u0000"}', None),
        (b'{"a": [' + b"[]," * 500 + b"[]]}", None),
    ],
)
def test_why_a_line_is_no_row(line: bytes, expected: str | None):
    assert reason(line) == expected


def test_numbers_that_python_writes_and_json_has_not_are_read():
    # In a column that nobody reads they must not cost the row; a rule on numbers can still refuse them.
    row = parse_line(b'{"score": NaN, "best": -Infinity}')
    assert isinstance(row, dict)
    assert math.isnan(row["score"]) and row["best"] == -math.inf


def test_columns_that_are_not_asked_for_do_not_matter():
    line = b'{"chosen": "a", "other": "\\ud800"}'
    assert parse_line(line, {"chosen", "rejected"}) == {"chosen": "a"}
    assert reason(line, {"other"}) == "invalid_unicode"


@pytest.mark.parametrize("text", ["x" * 10_000, "中" * 10_000, "😀" * 10_000])
def test_what_is_kept_of_a_bad_line_is_bounded(text: str):
    row = parse_line(text.encode())
    assert row == Unreadable("malformed_json", text[:RAW_BOUND])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(row=st.dictionaries(st.text(), JSON, max_size=4), ascii_only=st.booleans())
def test_what_python_writes_reads_back(row: dict[str, Any], ascii_only: bool):
    assert parse_line(json.dumps(row, ensure_ascii=ascii_only).encode()) == row


@given(st.binary())
def test_any_line_is_a_row_or_a_reason_and_what_is_kept_of_it_can_be_stored(line: bytes):
    row = parse_line(line)
    text = row.raw if isinstance(row, Unreadable) else json.dumps(row, ensure_ascii=False)
    assert text.encode("utf-8").decode("utf-8") == text
