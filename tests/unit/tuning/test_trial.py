"""What a trial tells Ray Tune, with a training that stands in for the real one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_ray.errors import ConfigError, DpoRayError, NonFiniteLoss
from dpo_ray.on_ray.held_trainer import PLACEMENT_GROUP, Stopped
from dpo_ray.storage.location import Location
from dpo_ray.training.files import HISTORY
from tests.unit.tuning.test_measures import METRICS
from tests.unit.tuning.test_space import config
from tuning import trial
from tuning.on_tune import make_scheduler
from tuning.trial import EVALUATION, FAILURE, SCORE, STEP, Work, evaluation_of

CONFIG = config({"beta": [0.1]})


def evaluated(step: int, accuracy: float) -> dict[str, Any]:
    return {**METRICS, "step": step, "eval_rewards/accuracies": accuracy}


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """attempt(training): an attempt whose training is a function of `tell`, which returns the lines of its history."""

    def begin(training: Callable[..., list[dict[str, Any]]], *evaluations: dict[str, Any], waits: bool = False):
        def train_policy(output: Any, made: Any, rows: Any, steering: Any, run_id: str) -> tuple[Any, bool]:
            hold = steering.make_trainer.keywords["hold"]
            lines = training(steering.make_trainer.keywords["tell"])
            while waits:
                if hold._stopped:
                    raise Stopped
            (tmp_path / HISTORY).write_text("\n".join(map(json.dumps, lines)))
            metrics = {"first_step_loss": 0.7, "num_steps": 10, "published_step": 8}
            policy = SimpleNamespace(
                fingerprint="abc",
                manifest=SimpleNamespace(metrics=metrics),
                file=lambda name: Location.of(tmp_path) / name,
            )
            return policy, False

        monkeypatch.setattr(trial, "train_policy", train_policy)
        work = Work("trial 0", CONFIG, "key", {"accuracy": 1.0}, 10, 1024, tuple(map(evaluation_of, evaluations)))
        return trial._Attempt(Location.of(tmp_path), work, None)  # type: ignore[arg-type]

    return begin


def test_evaluations_come_one_by_one_and_then_the_end(attempt):
    def training(tell: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
        tell({PLACEMENT_GROUP: "ff"})
        tell(evaluated(4, 0.6))
        tell({"step": 5, "loss": 0.5})  # a checkpoint's metrics, of no evaluation
        tell(evaluated(8, 0.7))
        tell(evaluated(10, 0.65))
        return [evaluated(4, 0.6), {"step": 5, "loss": 0.5}, evaluated(8, 0.7), evaluated(10, 0.65)]

    running = attempt(training)
    results = [running.result() for _ in range(5)]
    assert results[0] == {PLACEMENT_GROUP: "ff"}
    assert [(r[STEP], r.get(SCORE)) for r in results[1:4]] == [(4, 0.6), (8, 0.7), (10, None)]
    assert results[1][EVALUATION] == evaluation_of(evaluated(4, 0.6))
    end = results[4]
    assert (end["done"], end["state"], end["policy"], end["was_trained"]) == (True, "finished", "abc", True)
    assert [e["step"] for e in end["evaluations"]] == [4, 8, 10]
    assert (end[STEP], end[SCORE]) == (10, 0.7)  # schedulers read these


def test_what_an_earlier_attempt_has_told_comes_first(attempt):
    running = attempt(lambda tell: tell(evaluated(8, 0.7)) or [], evaluated(4, 0.6))
    # Nothing is decided by it: the scheduler has let it go on then.
    assert [(r[STEP], r.get(SCORE)) for r in (running.result() for _ in range(2))] == [(4, None), (8, 0.7)]


def diverges(tell: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    raise NonFiniteLoss("the loss is not finite")


def cannot_be(tell: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    raise ConfigError("no such layer")


@pytest.mark.parametrize(("training", "state"), [(diverges, "diverged"), (cannot_be, "failed")])
def test_what_would_end_alike_again_is_an_end(attempt, training, state: str):
    end = attempt(training).result()
    assert (end["done"], end["state"], end["policy"]) == (True, state, None) and end["reason"]
    assert end[STEP] == 0 and math.isnan(end[SCORE])


def test_what_may_go_better_another_time_is_raised_and_its_reason_told_before(attempt):
    def training(tell: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
        raise DpoRayError("the disk is full")

    running = attempt(training)
    assert running.result() == {FAILURE: "the disk is full"}
    with pytest.raises(DpoRayError, match="the disk is full"):
        running.result()


def test_a_stop_ends_the_training_before_it_returns(attempt):
    running = attempt(lambda tell: [], waits=True)
    running.stop()
    assert not running._thread.is_alive()


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_schedulers_take_every_end(attempt, kind: str):
    from dpo_ray.config.tune import ASHA, MedianStopping

    chosen = ASHA(type="asha") if kind == "asha" else MedianStopping(type="median", min_trials=2)
    scheduler = make_scheduler(chosen, eval_every_steps=2, num_steps=10, past=[])
    controller = SimpleNamespace(get_live_trials=lambda: [])
    for n, training in enumerate((diverges, cannot_be, lambda tell: tell(evaluated(4, 0.6)) or [])):

        class One:
            trial_id = f"{n}"

        one = One()
        running = attempt(training)
        scheduler.on_trial_add(controller, one)
        while True:
            result = running.result()
            if "done" in result:
                break
            scheduler.on_trial_result(controller, one, result)
        scheduler.on_trial_complete(controller, one, result)

    class Now:
        trial_id = "now"

    now = Now()
    scheduler.on_trial_add(controller, now)
    assert scheduler.on_trial_result(controller, now, {STEP: 4, SCORE: 0.7}) == "CONTINUE"
