"""Counts in bins."""

from __future__ import annotations

import numpy as np

from dpo_ray.histogram import FEWEST_BINS, MOST_BINS, histograms


def test_all_samples_share_the_bins_and_every_value_is_in_one():
    found = histograms({"a": np.arange(100.0), "b": np.array([50.0, 50.0, 99.0])})
    assert found is not None and not found["is_open"]
    assert len(found["edges"]) == 12 + 1 and (found["edges"][0], found["edges"][-1]) == (0.0, 99.0)
    assert (sum(found["counts"]["a"]), sum(found["counts"]["b"])) == (100, 3)


def test_the_more_values_the_more_bins_within_limits():
    def bins(n: int) -> int:
        found = histograms({"a": np.linspace(0, 1, n)})
        assert found is not None
        return len(found["edges"]) - 1

    assert (bins(5), bins(1000), bins(10**6)) == (FEWEST_BINS, 30, MOST_BINS)


def test_the_outermost_bins_hold_what_is_far_out_and_say_so():
    values = np.concatenate([np.linspace(-1, 1, 998), [1e6, -1e6]])
    found = histograms({"a": values})
    assert found is not None and found["is_open"] and found["edges"][-1] < 2
    assert sum(found["counts"]["a"]) == 1000


def test_whole_numbers_have_bins_around_them():
    found = histograms({"a": np.array([3, 3, 4, 6])}, whole=True)
    assert found is not None
    assert found["edges"] == [2.5, 3.5, 4.5, 5.5, 6.5] and found["counts"]["a"] == [2, 1, 0, 1]
    wide = histograms({"a": np.arange(1000)}, whole=True)
    assert wide is not None and len(wide["edges"]) <= MOST_BINS + 1 and sum(wide["counts"]["a"]) == 1000


def test_values_that_come_with_their_counts_are_as_if_written_out():
    values, counts = np.array([1.0, 2.0, 7.0]), np.array([5, 1, 4])
    assert histograms({"a": values}, {"a": counts}) == histograms({"a": np.repeat(values, counts)})


def test_one_value_has_a_bin_and_none_has_no_histogram():
    found = histograms({"a": np.array([2.0, 2.0])})
    assert found is not None and found["counts"]["a"] == [2] and found["edges"][0] < 2 < found["edges"][-1]
    assert histograms({"a": np.array([])}) is None and histograms({"a": np.array([np.nan, np.inf])}) is None
    left = histograms({"a": np.array([np.nan, 1.0, 2.0])})
    assert left is not None and sum(left["counts"]["a"]) == 2
