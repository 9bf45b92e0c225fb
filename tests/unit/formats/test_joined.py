"""Rows of one prompt are one row, however they are cut into parts."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.formats.joined import LARGEST, joined


def test_rows_that_follow_each_other_with_one_value_are_one_with_lists():
    rows = [{"p": "a", "r": 1}, {"p": "a", "r": 2, "s": 3}, {"p": "b", "r": 4}, "unreadable", {"p": "b", "r": 5}]
    assert list(joined(enumerate(rows), "p")) == [
        (0, {"p": "a", "r": [1, 2], "s": [None, 3]}),
        (2, {"p": "b", "r": [4]}),
        (3, "unreadable"),
        (4, {"p": "b", "r": [5]}),
    ]


def test_null_is_no_value_to_be_joined_by():
    assert len(list(joined(enumerate([{"p": None}, {"p": None}, {}, {}]), "p"))) == 4


@given(st.lists(st.sampled_from(["a", "b", None, 4]), max_size=12), st.lists(st.integers(0, 12), max_size=4))
def test_any_cut_into_parts_gives_what_the_whole_gives(values: list[Any], cuts: list[int]):
    rows = [(n, {"p": value, "n": n} if value != 4 else value) for n, value in enumerate(values)]
    ends = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    parts = [rows[first:last] for first, last in itertools.pairwise(ends)]
    found: list[Any] = []
    for number, part in enumerate(parts):
        after = [row for later in parts[number + 1 :] for row in later]
        found += joined(part, "p", parts[number - 1] if number else (), after)
    assert found == list(joined(rows, "p"))


def test_of_very_many_rows_with_one_value_the_first_are_taken():
    rows = [(n, {"p": "a", "n": n}) for n in range(3 * LARGEST)]
    [(number, row)] = joined(rows, "p")
    assert (number, row["n"]) == (0, list(range(LARGEST)))
    assert list(joined(rows[:1], "p", (), rows[1:])) == [(number, row)]
    assert list(joined(rows[LARGEST:], "p", rows[:LARGEST])) == []
