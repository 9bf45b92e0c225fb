"""Which pairs are measured, and how many tokens are counted."""

from __future__ import annotations

import random
import statistics
from itertools import islice

import pytest

from benchmarks.speed.pairs import (
    by_length,
    fixed_pair,
    generated_pairs,
    lengths_of,
    middle,
    padded_tokens,
    real_tokens,
    repeated,
    select,
    shared_tokens,
)


def pair(prompt: int, chosen: int, rejected: int) -> dict[str, list[int]]:
    return {"prompt_ids": [1] * prompt, "chosen_ids": [2] * chosen, "rejected_ids": [3] * rejected}


SHORT, LONG, MIDDLE = pair(1, 1, 2), pair(10, 1, 5), pair(4, 3, 1)


def test_pairs_are_selected_by_their_longer_completion():
    assert select(iter([LONG, SHORT, MIDDLE, SHORT]), 2, max_tokens=7) == [SHORT, MIDDLE]


def test_too_few_pairs_end_the_run():
    with pytest.raises(SystemExit, match="Only 1 pairs have at most 6 tokens; 2 are needed"):
        select([LONG, SHORT, MIDDLE], 2, max_tokens=6)


def test_generated_pairs_are_the_same_for_a_seed_and_about_as_long_as_they_should_be():
    some = list(islice(generated_pairs(100), 500))
    assert some[:5] == list(islice(generated_pairs(100), 5))
    assert some[:5] != list(islice(generated_pairs(100, seed=1), 5))
    medians = [statistics.median(sizes) for sizes in zip(*map(lengths_of, some), strict=True)]
    assert medians == pytest.approx([150, 45, 45], rel=0.15)
    assert all(0 <= i < 100 for ids in some[0].values() for i in ids)


def test_a_fixed_pair_has_the_lengths_asked_for():
    assert lengths_of(fixed_pair(random.Random(0), 50, (8, 4, 2))) == (8, 4, 2)


def test_sorted_pairs_stay_the_same_pairs():
    assert by_length([SHORT, LONG, MIDDLE]) == [LONG, MIDDLE, SHORT]


def test_the_middle_and_the_repeated_warm_up():
    rows = [pair(n, 1, 1) for n in range(5)]
    assert middle(rows, 3) == rows[1:4]
    assert middle(rows, 9) == rows
    assert repeated(rows[:2], 5) == [rows[0], rows[1], rows[0], rows[1], rows[0]]


def test_tokens_are_counted_real_shared_and_padded():
    assert real_tokens([LONG, SHORT]) == (20 + 1 + 5) + (2 + 1 + 2)
    assert shared_tokens([LONG, SHORT]) == 16 + 4
    assert padded_tokens([LONG, SHORT, MIDDLE], 2) == 2 * 2 * 15 + 2 * 1 * 7
