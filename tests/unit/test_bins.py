"""Batches of bounded size, in order."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.bins import batches


def test_a_batch_is_filled_up_to_the_limit_and_a_large_item_stands_alone():
    assert list(batches([3, 2, 1, 9, 1], int, 5)) == [[3, 2], [1], [9], [1]]
    assert list(batches([], int, 5)) == []


@given(st.lists(st.integers(0, 20)), st.integers(1, 15))
def test_no_item_is_lost_and_each_batch_could_not_have_taken_the_next_item(sizes: list[int], limit: int):
    found = list(batches(sizes, int, limit))
    assert [size for batch in found for size in batch] == sizes
    assert all(sum(batch) <= limit or len(batch) == 1 for batch in found)
    assert all(sum(one) + other[0] > limit for one, other in pairwise(found))
