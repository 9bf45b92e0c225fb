"""A scheduler that is told of earlier runs decides as if it had seen them."""

from __future__ import annotations

import pytest

from dpo_ray.config.tune import ASHA, FIFO, MedianStopping
from tuning.on_tune import Past, make_scheduler
from tuning.trial import SCORE, STEP

PAST = [Past(f"trial {n}", tuple((step, 0.5 + n / 10) for step in (2, 4, 6, 8))) for n in range(4)]


class Now:
    trial_id = "now"


class Controller:
    def get_live_trials(self) -> list:
        return []


def decision(chosen, past: list[Past], *results: tuple[int, float]) -> list[str]:
    scheduler = make_scheduler(chosen, eval_every_steps=2, num_steps=10, past=past)
    now = Now()
    scheduler.on_trial_add(Controller(), now)
    return [scheduler.on_trial_result(Controller(), now, {STEP: step, SCORE: score}) for step, score in results]


@pytest.mark.parametrize("chosen", [ASHA(type="asha", reduction_factor=2), MedianStopping(type="median")])
def test_a_trial_worse_than_those_of_earlier_runs_is_ended(chosen):
    assert decision(chosen, PAST, (2, 0.1)) == ["STOP"]
    assert decision(chosen, PAST, (2, 0.9)) == ["CONTINUE"]
    assert decision(chosen, [], (2, 0.1)) == ["CONTINUE"]  # nothing to compare with


def test_without_a_scheduler_nothing_is_ended():
    for chosen in (None, FIFO(type="fifo")):
        assert decision(chosen, PAST, (2, 0.1), (8, 0.1)) == ["CONTINUE", "CONTINUE"]


def test_who_has_come_to_the_last_step_is_not_ended():
    assert decision(ASHA(type="asha", reduction_factor=2), PAST, (2, 0.9), (10, 0.9)) == ["CONTINUE", "CONTINUE"]


def test_every_trial_may_make_its_grace_steps():
    patient = ASHA(type="asha", reduction_factor=2, grace_steps=4)
    assert decision(patient, PAST, (2, 0.1), (4, 0.1)) == ["CONTINUE", "STOP"]


def test_a_result_without_a_score_decides_nothing():
    scheduler = make_scheduler(ASHA(type="asha"), eval_every_steps=2, num_steps=10, past=PAST)
    scheduler.on_trial_add(Controller(), Now())
    assert scheduler.on_trial_result(Controller(), Now(), {"placement_group": "ab"}) == "CONTINUE"
