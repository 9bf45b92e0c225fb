"""What is recorded of a training for the next plan."""

from __future__ import annotations

import pytest

from dpo_ray.config import Train
from dpo_ray.training.steps import Steps


def history(*steps: tuple[int, int, float]) -> list[dict]:
    """Number of the step, tokens so far, tokens a second."""
    return [{"step": n, "num_tokens": tokens, "tokens_per_second": rate} for n, tokens, rate in steps]


def test_steps_count_by_their_time_and_the_first_one_does_not():
    # 900 tokens in 9 s, then 100 in 10 s.
    found = Steps.of(history((1, 500, 1.0), (2, 1400, 100.0), (3, 1500, 10.0)), Train(num_workers=2))
    assert found.tokens == 1500
    assert found.tokens_per_second == pytest.approx(1000 / 19)
    assert found.execution["num_workers"] == 2


def test_of_steps_that_are_not_all_logged_the_rates_count_alike():
    found = Steps.of(history((10, 500, 1.0), (20, 1000, 100.0), (30, 1500, 50.0)), Train())
    assert found.tokens_per_second == pytest.approx(2 / (1 / 100 + 1 / 50))


def test_a_single_step_is_all_there_is():
    assert Steps.of(history((1, 500, 25.0)), Train()).tokens_per_second == 25
