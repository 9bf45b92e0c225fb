"""Scored candidates → pairs, and rows → mismatched rows."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.data.pairing import make_pairs, mismatched_rows
from dpo_ray.errors import DpoRayError
from dpo_ray.pairs import Message

PROMPT = [Message(role="user", content="Why?")]


def paired(scored: dict[str, float], gap: float = 0.1, at_most: int = 1) -> tuple[list[tuple[str, str]], Counter[str]]:
    pairs, passed_over = make_pairs(
        PROMPT, list(scored), list(scored.values()), min_score_gap=gap, pairs_per_prompt=at_most
    )
    assert all(pair.prompt == tuple(PROMPT) for pair in pairs)
    return [(pair.chosen, pair.rejected) for pair in pairs], passed_over


def test_the_best_is_chosen_over_the_worst():
    assert paired({"b": 0.5, "a": 0.1, "c": 0.9}) == ([("c", "a")], Counter())


def test_each_completion_is_in_one_pair_at_most():
    pairs, _ = paired({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.8, "e": 0.9}, at_most=5)
    assert pairs == [("e", "a"), ("d", "b")]


def test_a_pair_too_near_is_a_tie_and_ends_the_prompt():
    # .9 - .1 = .8 is a pair; .5 - .45 = .05 < .1 is a tie, counted once.
    pairs, passed_over = paired({"a": 0.9, "b": 0.1, "c": 0.5, "d": 0.45}, at_most=2)
    assert pairs == [("a", "b")]
    assert passed_over == {"tie": 1}


@pytest.mark.parametrize(("gap", "count"), [(0.5, 1), (0.5001, 0)])
def test_a_gap_of_just_the_minimum_is_no_tie(gap: float, count: int):
    assert len(paired({"a": 0.75, "b": 0.25}, gap)[0]) == count


@pytest.mark.parametrize("tenths", range(10))
def test_scores_of_one_decimal_differ_by_a_tenth(tenths: int):
    assert len(paired({"a": (tenths + 1) / 10, "b": tenths / 10}, 0.1)[0]) == 1


def test_completions_equal_but_for_outer_space_count_once_with_the_first_score():
    pairs, passed_over = make_pairs(PROMPT, ["a", " a\n", "b"], [0.9, 0.0, 0.5], min_score_gap=0.1, pairs_per_prompt=3)
    assert [(p.chosen, p.rejected) for p in pairs] == [("a", "b")]
    assert passed_over == {"duplicate": 1}


def test_empty_completions_are_never_a_side_of_a_pair():
    pairs, passed_over = paired({"": 0.0, "a": 0.9, " ": 1.0, "b": 0.1})
    assert pairs == [("a", "b")]
    assert passed_over == {"empty_response": 2}


@pytest.mark.parametrize("completions", [[], ["a"], ["a", "a "], ["a", ""]])
def test_fewer_than_two_distinct_completions_make_no_pair(completions: list[str]):
    pairs, passed_over = make_pairs(
        PROMPT, completions, [1.0, 0.0][: len(completions)], min_score_gap=0.1, pairs_per_prompt=1
    )
    assert pairs == []
    assert passed_over["too_few_distinct"] == 1


def test_a_score_is_needed_for_each_completion():
    with pytest.raises(ValueError, match="zip"):
        make_pairs(PROMPT, ["a", "b"], [1.0], min_score_gap=0.1, pairs_per_prompt=1)


@given(st.permutations([("a", 0.9), ("b", 0.9), ("c", 0.1), ("d", 0.1), ("e", 0.5)]))
def test_the_order_of_the_samples_does_not_matter(samples: list[tuple[str, float]]):
    assert paired(dict(samples), at_most=2)[0] == [("a", "d"), ("b", "c")]


@pytest.mark.parametrize("position", [0, 1])
def test_a_score_that_is_not_a_number_never_makes_a_preference(position: int):
    scores = [0.5, 0.5]
    scores[position] = math.nan
    try:
        pairs, _ = make_pairs(PROMPT, ["a", "b"], scores, min_score_gap=0.1, pairs_per_prompt=1)
    except DpoRayError:
        return
    assert pairs == []


def test_a_mismatched_row_is_the_next_one_with_another_prompt_cyclically():
    assert mismatched_rows(["a", "b", "c"], ["train"] * 3) == [1, 2, 0]
    assert mismatched_rows(["a", "a", "b", "a"], ["train"] * 4) == [2, 2, 3, 2]


def test_a_mismatched_row_is_of_the_same_split():
    assert mismatched_rows(["a", "b", "c", "d"], ["train", "eval", "train", "eval"]) == [2, 3, 0, 1]
    assert mismatched_rows(["a", "b", "c"], ["train", "eval", "train"]) == [2, None, 0]


def test_where_there_is_no_other_prompt_there_is_no_mismatched_row():
    assert mismatched_rows(["a", "a"], ["train"] * 2) == [None, None]
    assert mismatched_rows([], []) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["train", "eval"])), max_size=12))
def test_the_mismatched_row_is_the_nearest_that_will_do(rows: list[tuple[str, str]]):
    found = mismatched_rows([prompt for prompt, _ in rows], [split for _, split in rows])
    for i, (prompt, split) in enumerate(rows):
        following = [j % len(rows) for j in range(i + 1, i + len(rows))]
        other = [j for j in following if rows[j][1] == split and rows[j][0] != prompt]
        assert found[i] == (other[0] if other else None)
