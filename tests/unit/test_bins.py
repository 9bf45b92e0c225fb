"""Items → groups: batches in order, groups of bounded size, and shares of near-equal cost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.bins import batches, first_fit, split_up, spread


def test_a_batch_is_filled_up_to_the_limit_and_a_large_item_stands_alone():
    assert list(batches([3, 2, 1, 9, 1], int, 5)) == [[3, 2], [1], [9], [1]]
    assert list(batches([], int, 5)) == []


@given(st.lists(st.integers(0, 20)), st.integers(1, 15))
def test_no_item_is_lost_and_each_batch_could_not_have_taken_the_next_item(sizes: list[int], limit: int):
    found = list(batches(sizes, int, limit))
    assert [size for batch in found for size in batch] == sizes
    assert all(sum(batch) <= limit or len(batch) == 1 for batch in found)
    assert all(sum(one) + other[0] > limit for one, other in pairwise(found))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 300))
def test_groups_hold_every_item_once_and_never_exceed_the_limit_unless_alone(tokens: list[int], limit: int):
    groups = first_fit(tokens, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(tokens)))
    assert all(len(group) == 1 or sum(tokens[i] for i in group) <= limit for group in groups)
    assert groups == first_fit(tokens, limit)


def test_items_are_fitted_longest_first():
    # 6 takes a group, 4 joins it (10); 5 and 5 fill the next; 3 begins a third.
    assert first_fit([5, 3, 6, 4, 5], 10) == [[2, 3], [0, 4], [1]]


def test_an_item_over_the_limit_goes_alone():
    assert first_fit([3, 99, 4], 10) == [[1], [2, 0]]


def test_groups_are_cut_in_halves_the_one_with_most_tokens_first():
    tokens = np.array([5, 5, 9, 1, 1, 1])
    # 0 and 1 have 10 tokens, 2 to 5 have 12: cut into [2, 4] with 10 and [3, 5] with 2.
    assert split_up([[0, 1], [2, 3, 4, 5]], tokens, 3) == [[0, 1], [2, 4], [3, 5]]
    # Of equals the first.
    assert split_up([[0, 1], [2, 3, 4, 5]], tokens, 4) == [[2, 4], [3, 5], [0], [1]]
    assert split_up([[0, 1], [2, 3, 4, 5]], tokens, 2) == [[0, 1], [2, 3, 4, 5]]


def test_where_no_group_can_be_cut_empty_ones_are_added():
    assert split_up([[2], [0, 1]], np.array([9, 1, 1]), 5) == [[2], [0], [1], [], []]
    assert split_up([], np.array([]), 2) == [[], []]


@given(st.lists(st.floats(0.5, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_costs_are_spread_nearly_evenly(costs: list[float], ranks: int):
    shares = spread(np.array(costs), ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    # Longest first: when its last item was laid on a rank, that rank had the least.
    assert max(loads) - min(loads) <= max(costs) * (1 + 1e-12)
    if len(costs) >= ranks:
        assert all(shares)


def test_costs_are_spread_by_hand():
    # 5 → rank 0, 4 → rank 1, 3 → rank 1 (7), 3 → rank 0 (8), 1 → rank 1 (8).
    assert spread(np.array([3.0, 5.0, 1.0, 4.0, 3.0]), 2) == [[1, 4], [3, 0, 2]]
