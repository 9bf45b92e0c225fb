"""Arrays of JSON as lines."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_ray.data.raw import json_array
from dpo_ray.data.raw.json_array import array_lines, begins_array
from dpo_ray.data.raw.json_lines import MAX_LINE_BYTES, parse_line

_TEXT = st.text(st.sampled_from('ab"\\,]}{[:\n é\ud800'), max_size=6)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


def lines(data: bytes, length: int | None = None, *, inside: bool = False) -> list[tuple[bytes, int]]:
    return list(array_lines(io.BytesIO(data), length, inside=inside))


@given(st.lists(_JSON, min_size=1, max_size=8), st.sampled_from([None, 1]), st.integers(1, 9), st.data())
@example([{"a": '"'}, {"b": "\\"}, '\\\\"'], None, 1, None)
def test_any_elements_are_found_wherever_the_stream_is_cut_and_each_part_by_itself(
    values: list[Any], indent: int | None, chunk: int, data: st.DataObject | None
):
    text = json.dumps(values, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_CHUNK", chunk)
        found = lines(b"\xef\xbb\xbf \n" + text + b"\n")
        assert [json.loads(line) for line, _ in found] == values
        sizes = [size for _, size in found]
        assert sum(sizes) == len(text) + 5
        ends = [0, *(sum(sizes[: n + 1]) for n in range(len(sizes)))]
        first = data.draw(st.integers(0, len(values) - 1)) if data else 1
        last = data.draw(st.integers(first + 1, len(values))) if data else 2
        part = (b"\xef\xbb\xbf \n" + text)[ends[first] : ends[last]]
        there = lines(part, len(part), inside=first > 0)
        assert [json.loads(line) for line, _ in there] == values[first:last]
        assert sum(size for _, size in there) == len(part)


def test_an_element_that_is_bad_costs_itself_only():
    found = [
        parse_line(line)
        for line, _ in lines(b'[{"a": "\xff"}, {"a": 1} {}, {"a": NaN}, {"a": "\\ud800"}, 3, {"a": 2}]')
    ]
    reasons = [getattr(row, "reason", None) for row in found]
    assert reasons == ["invalid_utf8", "malformed_json", None, "invalid_unicode", "not_an_object", None]
    assert found[-1] == {"a": 2}


def test_an_array_without_elements_has_blank_lines_only():
    assert [line for line, _ in lines(b"[ \n ]")] == [b""]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'[{"a": 1}, {"b"', "ends after 1 elements"),
        (b"[1, 2", "ends after 1 elements"),
        (b"", "ends after 0 elements"),
        (b"[1] x", "something follows the closing bracket, after 1 elements"),
        (b"[1][2]", "something follows the closing bracket"),
    ],
)
def test_an_array_that_does_not_end_as_it_should_is_an_error(data: bytes, why: str):
    with pytest.raises(ValueError, match=why):
        lines(data)


def test_of_a_very_long_element_no_more_is_held_than_of_a_line():
    class Endless:
        left = 3 * MAX_LINE_BYTES

        def read(self, size: int) -> bytes:
            size = min(size, self.left)
            self.left -= size
            return b"x" * size

    class Chained:
        def __init__(self) -> None:
            self.streams: list[Any] = [io.BytesIO(b'[{"a": "'), Endless(), io.BytesIO(b'"}, {"a": 1}]')]

        def read(self, size: int) -> bytes:
            while self.streams:
                if data := self.streams[0].read(size):
                    return data
                self.streams.pop(0)
            return b""

    (long, size), (short, _) = array_lines(Chained())
    assert len(long) == MAX_LINE_BYTES + 1 and size == 3 * MAX_LINE_BYTES + len(b'[{"a": ""},')
    assert parse_line(long).reason == "too_long" and json.loads(short) == {"a": 1}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[1]", True),
        (b"\xef\xbb\xbf\r\n\t [", True),
        (b" " * 10_000 + b"[", True),
        (b'{"a": [1]}', False),
        (b"", False),
        (b"  \n", False),
    ],
)
def test_an_array_is_told_by_the_first_character_that_says_anything(data: bytes, expected: bool):
    assert begins_array(io.BytesIO(data)) == expected
