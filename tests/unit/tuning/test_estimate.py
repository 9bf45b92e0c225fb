"""What a sweep will cost."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_ray.config.tune import ASHA
from dpo_ray.training.index import PlanIndex
from tests.unit.tuning.test_space import config, searched
from tuning.estimate import Load, estimate_lines, load_of, share_of_steps


def index(*lengths: tuple[int, int, int]) -> PlanIndex:
    n = len(lengths)
    return PlanIndex.of(["shard"], np.array([0, n]), np.arange(n, dtype=np.int32), np.array(lengths), n)


def test_a_trial_computes_its_steps_and_a_third_of_what_it_evaluates():
    made = config({"beta": [0.1]}, train={"global_batch_size": 2, "eval_every_steps": 4, "eval_pairs": 1})
    trained, ranked = index((10, 5, 5), (20, 5, 5)), index((30, 10, 10), (30, 10, 10))
    load = load_of(made, 10, trained, ranked)
    # 10 steps of 2 pairs of 40 tokens in the mean; evaluations after 4, 8 and 10 steps, each of one pair of 80.
    assert load == Load(10, pytest.approx(10 * 2 * 40 + 3 * 80 / 3))


def test_asha_makes_the_share_that_its_rungs_leave():
    # All for 10 steps, a third to 30, a ninth to 90, one in 27 to the end.
    asha = ASHA(type="asha", reduction_factor=3)
    assert share_of_steps(asha, 10, 100) == pytest.approx((10 + 20 / 3 + 60 / 9 + 10 / 27) / 100)
    assert share_of_steps(ASHA(type="asha", grace_steps=100), 10, 100) == 1.0


def lines(**changes: object) -> str:
    given: dict = {
        "open_trials": 12,
        "at_once": 2,
        "tokens_per_second": 500.0,
        "rows_scored": 900,
        "preparations": 1,
    } | changes
    made = given.pop("config", searched({"train.learning_rate": [1e-5]}, num_trials=12))
    return "\n".join(estimate_lines(made, [Load(100, 200_000), Load(100, 400_000)], **given))


def test_hours_follow_from_tokens_speed_and_trials_at_once():
    told = lines()
    assert "12 trials of about 100 steps" in told and "300k tokens each" in told
    assert "about 60 min" in told  # 12 × 300,000 / 500 / 2 s
    assert "900 rows, once for all trials" in told and "11 times more" in told


def test_what_early_stopping_and_repetitions_change_is_told():
    tune = {"space": {"train.learning_rate": [1e-5]}, "search": "random", "num_trials": 12}
    made = config({**tune, "scheduler": "asha", "repeat_best": {"k": 2, "seeds": 3}}, train={"eval_every_steps": 10})
    told = lines(config=made)
    assert "12 trials and 6 repetitions" in told and "24% of that" in told


def test_a_speed_that_is_not_known_is_not_made_up():
    told = lines(tokens_per_second=None)
    assert "when the first trial has come to its end" in told and " h," not in told


def test_without_a_reference_none_is_said_to_be_shared():
    assert "reference" not in lines(rows_scored=0)
    assert "once for each of 3 sets of rows" in lines(preparations=3)
