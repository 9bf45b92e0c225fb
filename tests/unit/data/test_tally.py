"""Counters, told apart by what they mean."""

from __future__ import annotations

import pytest

from dpo_ray.data.tally import NOTED, Tally


def test_the_counters_of_a_stage_are_told_apart():
    counters = {
        "boundary_merge": 2, "duplicate": 1, "kept": 6, "more_pairs": 3, "other_split": 7, "prompt_too_long": 4,
        "read": 11, "tie": 0, "tokens": 99, "truncated_prompt": 1,
    }  # fmt: skip
    tally = Tally.of(counters)
    assert (tally.read, tally.kept, tally.more_pairs) == (11, 6, 3)
    assert tally.dropped == {"duplicate": 1, "prompt_too_long": 4}
    # In the order in which they are explained, not in that of the counters.
    assert list(tally.noted.items()) == [("truncated_prompt", 1), ("boundary_merge", 2)]
    assert list(NOTED).index("truncated_prompt") < list(NOTED).index("boundary_merge")


def test_reasons_are_given_in_the_order_that_is_asked_for():
    tally = Tally.of({"read": 9, "kept": 2, "a": 1, "b": 2, "c": 4})
    assert list(tally.dropped_for(["c", "x", "a"]).items()) == [("c", 4), ("a", 1)]


def test_what_counts_no_rows_has_no_tally():
    with pytest.raises(KeyError, match="read"):
        Tally.of({})
