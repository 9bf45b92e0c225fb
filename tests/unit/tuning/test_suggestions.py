"""Which point comes next: the same for the same number, whatever was interrupted; better where trials have shown it."""

from __future__ import annotations

import math

from tests.unit.tuning.test_space import LOSSES, config, searched
from tuning.records import State, Trial
from tuning.space import Given, Point, drawn, points
from tuning.suggestions import next_point, num_trials, study_of

SPACE = {"train.loss": LOSSES, "train.learning_rate": {"loguniform": [1e-6, 1e-4]}, "train.epochs": {"integer": [1, 4]}}


def trial(number: int, point: Point, accuracy: float | None, state: State = "finished") -> Trial:
    measured = {} if accuracy is None else {"accuracy": {"value": accuracy, "se": 0.03, "low": 0.0, "high": 1.0}}
    return Trial(number=number, point=point, seed=0, state=state, step=20, measured=measured)


def test_a_grid_has_its_points_in_order():
    grid = config({"beta": [0.1, 0.2], "learning_rate": [1e-5, 1e-4]})
    assert num_trials(grid.tune) == 4
    assert [next_point(grid, n, []) for n in range(4)] == list(points(grid.tune.searched()))


def test_a_random_point_follows_from_its_number_and_the_seed_alone():
    made = searched(SPACE)
    first = [next_point(made, n, []) for n in range(20)]
    assert [next_point(made, n, [trial(0, first[0], 0.9)]) for n in range(20)] == first
    assert len({str(point) for point in first}) == 20
    wider = searched(SPACE, num_trials=50)
    assert [next_point(wider, n, []) for n in range(20)] == first
    other = made.model_copy(update={"run": made.run.model_copy(update={"seed": 1})})
    assert [next_point(other, n, []) for n in range(20)] != first


def test_random_points_cover_a_log_range_evenly_in_its_logarithm():
    made = searched({"train.learning_rate": {"loguniform": [1e-6, 1e-4]}})
    rates = [next_point(made, n, [])["train.learning_rate"] for n in range(400)]
    assert all(1e-6 <= rate <= 1e-4 for rate in rates)
    assert 160 < sum(rate < 1e-5 for rate in rates) < 240


def test_the_estimator_looks_where_trials_were_good():
    made = searched(SPACE, search="tpe", num_trials=40)  # of which 10 are drawn by chance
    chance, after = 0.0, 0.0
    for seed in range(5):
        one = made.model_copy(update={"run": made.run.model_copy(update={"seed": seed})})
        known: list[Trial] = []
        for number in range(40):
            point = next_point(one, number, known)
            distance = abs(math.log10(point["train.learning_rate"]) + 4.7)
            known.append(trial(number, point, 0.5 + 0.4 * math.exp(-4 * distance**2)))
            chance += distance / 10 * (number < 10)
            after += distance / 20 * (number >= 20)
    assert after < 0.6 * chance


def test_the_estimator_repeats_itself_for_the_same_trials():
    made = searched(SPACE, search="tpe", num_trials=40)
    known = [trial(n, next_point(searched(SPACE), n, []), 0.5 + n / 100) for n in range(15)]
    assert next_point(made, 15, known) == next_point(made, 15, known)
    assert next_point(made, 15, known) != next_point(made, 16, known)


def test_optuna_is_told_what_became_of_trials():
    made = searched(SPACE, search="tpe")
    drawn_points = [next_point(made, n, []) for n in range(5)]
    states: list[State] = ["finished", "stopped", "diverged", "failed", "training"]
    trials = [
        trial(n, point, None if state in {"diverged", "failed", "training"} else 0.7, state)
        for n, (point, state) in enumerate(zip(drawn_points, states, strict=True))
    ]
    found = study_of(made.tune, trials).trials
    assert [t.state.name for t in found] == ["COMPLETE", "PRUNED", "PRUNED", "FAIL", "RUNNING"]
    assert found[0].values == [0.7]
    assert found[1].intermediate_values == {20: 0.7}
    assert found[2].intermediate_values == {}  # the worst that there is
    assert [t.params for t in found] == drawn_points


def test_with_several_objectives_a_trial_that_was_ended_counts_by_its_last_values():
    made = searched(SPACE, search="tpe", rank_by=["accuracy", "chosen_logps"])
    point = next_point(made, 0, [])
    stopped = trial(0, point, 0.7, "stopped")
    stopped.measured["chosen_logps"] = {"value": -30.0, "se": 1.0, "low": -32.0, "high": -28.0}
    found = study_of(made.tune, [stopped, trial(1, point, None, "diverged")]).trials
    assert [(t.state.name, t.values) for t in found] == [("COMPLETE", [0.7, -30.0]), ("FAIL", None)]


def test_a_point_of_the_estimator_is_one_of_the_space():
    made = searched(SPACE, search="tpe")
    for number in range(30):
        values = drawn(made.tune.searched(), Given(next_point(made, number, [])))
        assert 1 <= values["train.epochs"] <= 4 and 1e-6 <= values["train.learning_rate"] <= 1e-4
