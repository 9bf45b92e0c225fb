"""Curves that a page can hold."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dpo_ray.report.curves import MOST_POINTS, read_curves, smoothed


def lines(values: list[float]) -> list[bytes]:
    return [json.dumps({"step": n + 1, "loss": value}).encode() for n, value in enumerate(values)]


def test_a_short_curve_keeps_every_point():
    curve = read_curves(lines([3.0, 1.0, 2.0])).trained["loss"]
    assert (curve.steps, curve.raw) == ([1, 2, 3], [3.0, 1.0, 2.0]) and not curve.is_thinned
    assert curve.low == curve.high == curve.raw


def test_a_long_curve_is_thinned_and_its_extremes_stay_in_the_band():
    values = np.ones(100_000)
    values[54_321] = 1e3
    curve = read_curves(lines(values.tolist())).trained["loss"]
    assert len(curve.steps) == MOST_POINTS and curve.is_thinned and curve.num_points == 100_000
    assert curve.steps[-1] == 100_000 and max(curve.high) == 1e3 and curve.low == [1.0] * MOST_POINTS
    assert sum(value > 1 for value in curve.raw) == 1


def test_held_out_curves_go_by_the_name_of_what_they_stand_beside():
    found = read_curves([b'{"step": 5, "loss": 0.5, "eval_loss": 0.6}', b'{"step": 6, "loss": 0.4}'])
    assert found.held_out["loss"].steps == [5] and found.trained["loss"].steps == [5, 6]
    assert "step" not in found.trained


def test_what_is_no_number_and_lines_without_a_step_are_passed_over():
    found = read_curves([b'{"step": 1, "loss": NaN, "skipped_pairs": ["a"], "flag": true}', b'{"note": 1.0}'])
    assert found.trained == {} and found.held_out == {}


def test_a_smoothed_curve_is_neither_pulled_to_zero_nor_late():
    assert smoothed(np.full(50, 3.0)) == pytest.approx(3.0)
    rising = smoothed(np.arange(101.0))
    assert np.all(np.diff(rising) > 0) and rising[50] == pytest.approx(50.0)
    noise = np.random.default_rng(0).normal(size=1000)
    assert smoothed(noise).std() < 0.3 * noise.std()
