"""What a sweep knows of its trials, after a kill too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import DataError
from dpo_ray.storage.location import Location
from tests.unit.tuning.test_space import config, searched
from tuning.records import Evaluation, Records, identity

ROWS, WEIGHTS = ["abc"], ["model"]


def evaluation(step: int, accuracy: float) -> Evaluation:
    found = {"value": accuracy, "se": 0.1, "low": 0.0, "high": 1.0}
    return {"step": step, "loss": 0.6, "measured": {"accuracy": found}}


def test_what_was_written_is_there_again(tmp_path: Path):
    output = Location.of(tmp_path)
    records = Records.of(output, {"a": 1})
    trial = records.get(3, 0, {"train.learning_rate": 1e-5})
    trial.state = "training"
    records.evaluated(trial, evaluation(4, 0.6))
    again = Records.of(output, {"a": 1})
    assert again.trials == records.trials
    assert again.get(3, 0, {}) is again.trials["0003-seed0"]
    assert Records.of(output, {"a": 2}).trials == {}


def test_an_evaluation_that_comes_again_takes_the_place_of_the_first(tmp_path: Path):
    records = Records.of(Location.of(tmp_path), {})
    trial = records.get(0, 0, {})
    for step, accuracy in ((4, 0.6), (8, 0.7), (4, 0.61), (12, 0.8)):
        records.evaluated(trial, evaluation(step, accuracy))
    told = [(e["step"], e["measured"]["accuracy"]["value"]) for e in trial.evaluations]
    assert told == [(4, 0.61), (8, 0.7), (12, 0.8)]
    assert trial.step == 12 and trial.measured["accuracy"]["value"] == 0.8


def test_trials_of_the_search_are_those_of_its_seed_in_order(tmp_path: Path):
    records = Records.of(Location.of(tmp_path), {})
    for number, seed in ((10, 0), (2, 0), (2, 1)):
        records.write(records.get(number, seed, {}))
    assert [(t.number, t.seed) for t in Records.of(Location.of(tmp_path), {}).search(0)] == [(2, 0), (10, 0)]


def test_what_failed_is_tried_again_and_what_has_ended_is_not(tmp_path: Path):
    records = Records.of(Location.of(tmp_path), {})
    ended = {}
    for number, state in enumerate(("waiting", "training", "finished", "stopped", "diverged", "failed")):
        trial = records.get(number, 0, {})
        trial.state = state  # type: ignore[assignment]
        ended[state] = trial.has_ended
    assert [state for state, has in ended.items() if has] == ["finished", "stopped", "diverged"]


def test_a_damaged_record_is_named(tmp_path: Path):
    records = Records.of(Location.of(tmp_path), {})
    records.write(records.get(0, 0, {}))
    file = Path(records.folder.uri) / "trials" / "0000-seed0.json"
    file.write_text("{")
    with pytest.raises(DataError, match=f"{file} is not a trial's record"):
        Records.of(Location.of(tmp_path), {})


SPACE = {"train.learning_rate": {"loguniform": [1e-6, 1e-4]}}


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        ({"num_trials": 50}, False),
        ({"max_concurrent_trials": 3}, False),
        ({"max_failures": 5}, False),
        ({"repeat_best": {"k": 2}}, False),
        ({"keep_models": 9}, False),
        ({"rank_by": "margin"}, True),
        ({"scheduler": "asha"}, True),
        ({"search": "tpe"}, True),
        ({"ranked_fraction": 0.3}, True),
        ({"space": {"train.learning_rate": {"loguniform": [1e-6, 1e-3]}}}, True),
    ],
)
def test_more_trials_are_the_same_sweep_and_another_search_is_not(change: dict[str, Any], is_another: bool):
    first = searched(SPACE)
    assert (
        identity(searched(**{"space": SPACE, **change}), ROWS, WEIGHTS) != identity(first, ROWS, WEIGHTS)
    ) is is_another


def test_other_rows_and_another_training_are_another_sweep():
    first = searched(SPACE)
    assert identity(first, ["xyz"], WEIGHTS) != identity(first, ROWS, WEIGHTS)
    assert identity(first, ROWS, ["other weights"]) != identity(first, ROWS, WEIGHTS)
    longer = config({"space": SPACE, "search": "random", "num_trials": 5}, train={"epochs": 2, "eval_every_steps": 5})
    assert identity(longer, ROWS, WEIGHTS) != identity(first, ROWS, WEIGHTS)
