"""The order of trials, what chance could have made of it, and the table that stays."""

from __future__ import annotations

import io
import math
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.unit.tuning.test_space import config, searched
from tuning.records import Trial
from tuning.results import described, measured_line, ranked, results_table, shown_values


def measure(value: float, se: float = 0.02) -> dict[str, float]:
    return {"value": value, "se": se, "low": value - 2 * se, "high": value + 2 * se}


def trial(number: int, accuracy: float | None, *, seed: int = 0, state: Any = "finished", **measures: float) -> Trial:
    found = {} if accuracy is None else {"accuracy": measure(accuracy)}
    found |= {name: measure(value, 0.1) for name, value in measures.items()}
    point = {"train.loss.beta": str(number), "train.learning_rate": 1e-5}
    return Trial(number=number, point=point, seed=seed, state=state, step=20, num_steps=20, measured=found)


SPACE = {"train.loss.beta": list(range(1, 9)), "train.learning_rate": {"loguniform": [1e-6, 1e-4]}}
TUNE = searched(SPACE).tune


def test_the_best_comes_first_and_who_cannot_be_told_from_it_is_named():
    places = ranked(TUNE, [trial(1, 0.70), trial(2, 0.90), trial(3, 0.86), trial(4, None)])
    assert [place.trial.number for place in places] == [2, 3, 1]
    assert [place.is_tied for place in places] == [False, True, False]


def test_who_did_not_come_to_the_end_has_no_place():
    ended = [trial(1, 0.99, state="stopped"), trial(2, 0.99, state="diverged"), trial(3, 0.99, state="failed")]
    assert [place.trial.number for place in ranked(TUNE, [*ended, trial(4, 0.5)])] == [4]
    assert ranked(TUNE, ended) == []


def test_among_equals_the_margin_decides():
    places = ranked(TUNE, [trial(1, 0.8, margin=1.0), trial(2, 0.8, margin=3.0), trial(3, 0.8, margin=2.0)])
    assert [place.trial.number for place in places] == [2, 3, 1]


def test_the_mean_over_seeds_counts_and_may_put_another_one_first():
    trials = [trial(1, 0.90), trial(2, 0.88), trial(3, 0.87)]
    repeats = [trial(1, 0.70, seed=1), trial(1, 0.74, seed=2), trial(2, 0.86, seed=1), trial(2, 0.90, seed=2)]
    places = ranked(TUNE, trials, repeats)
    assert [place.trial.number for place in places] == [2, 1, 3]
    best = places[0]
    assert best.score[0] == pytest.approx(0.88) and best.spread == pytest.approx(0.02)
    # The pairs' own chance does not get less by more seeds.
    assert best.score[1] == pytest.approx(math.hypot(0.02, 0.02 / math.sqrt(3)))
    assert places[2].spread is None


def test_a_repeat_that_did_not_come_to_its_end_counts_for_nothing():
    trials = [trial(1, 0.90), trial(2, 0.80)]
    repeats = [trial(1, 0.10, seed=1, state="failed"), trial(1, 0.88, seed=2), trial(2, 0.82, seed=1)]
    best = ranked(TUNE, trials, repeats)[0]
    assert best.trial.number == 1 and best.score[0] == pytest.approx(0.89) and len(best.repeats) == 1


def test_who_has_lost_its_repeat_to_an_error_is_still_among_those_that_were_repeated():
    trials = [trial(1, 0.90), trial(2, 0.88), trial(3, 0.95)]
    repeats = [trial(1, None, seed=1, state="failed"), trial(2, 0.60, seed=1)]
    assert [place.trial.number for place in ranked(TUNE, trials, repeats)] == [1, 2, 3]


def test_a_point_that_diverges_with_another_seed_comes_last():
    trials = [trial(1, 0.90), trial(2, 0.80), trial(3, 0.70)]
    repeats = [trial(1, None, seed=1, state="diverged"), trial(1, 0.92, seed=2), trial(2, 0.80, seed=1)]
    assert [place.trial.number for place in ranked(TUNE, trials, repeats)] == [2, 3, 1]


def test_with_several_objectives_the_front_comes_first():
    tune = searched(SPACE, rank_by=["accuracy", "likelihood_drop"]).tune
    trials = [
        trial(1, 0.9, likelihood_drop=5.0),
        trial(2, 0.8, likelihood_drop=1.0),
        trial(3, 0.85, likelihood_drop=6.0),  # worse than 1 in both
    ]
    places = ranked(tune, trials)
    assert [(place.trial.number, place.on_front) for place in places] == [(1, True), (2, True), (3, False)]


def test_less_is_better_where_it_is():
    tune = searched(SPACE, rank_by="likelihood_drop").tune
    places = ranked(tune, [trial(1, 0.9, likelihood_drop=5.0), trial(2, 0.5, likelihood_drop=1.0)])
    assert [place.trial.number for place in places] == [2, 1]


def test_the_table_has_a_row_a_trial_and_a_column_for_each_path_and_measure():
    trials = [trial(1, 0.9, margin=2.0), trial(2, None, state="diverged"), trial(1, 0.8, seed=1)]
    trials[1].reason = "not finite"
    table = pq.read_table(io.BytesIO(results_table(TUNE, trials)))
    assert table["number"].to_pylist() == [1, 2, 1] and table["seed"].to_pylist() == [0, 0, 1]
    assert table["train.loss.beta"].to_pylist() == [1, 2, 1]
    assert table["train.learning_rate"].to_pylist() == [1e-5] * 3
    assert table["accuracy"].to_pylist() == [0.9, None, 0.8]
    assert table["margin_low"].to_pylist() == [pytest.approx(1.8), None, None]
    assert table["reason"].to_pylist() == [None, "not finite", None]


def test_whole_sections_have_a_column_for_each_of_their_values():
    made = config({"space": {"train.loss": [{"type": "sigmoid", "beta": {"choice": [0.1, 0.3]}}, {"type": "orpo"}]}})
    one = Trial(number=0, point={"train.loss": "sigmoid", "train.loss[sigmoid].beta": "0.3"}, seed=0)
    other = Trial(number=1, point={"train.loss": "orpo"}, seed=0)
    assert shown_values(made.tune, one) == {"train.loss.type": "sigmoid", "train.loss.beta": 0.3}
    table = pq.read_table(io.BytesIO(results_table(made.tune, [one, other])))
    assert table["train.loss.type"].to_pylist() == ["sigmoid", "orpo"]
    assert table["train.loss.beta"].to_pylist() == [0.3, None]
    assert described(made.tune, one) == "train.loss.type sigmoid, train.loss.beta 0.3"


def test_a_line_names_what_was_measured_with_its_interval():
    found = trial(1, 0.9, margin=2.0, likelihood_drop=1.5, chosen_logps=-40.0).measured
    line = measured_line(found)
    assert line == "held-out accuracy 0.900 [0.860, 0.940], margin 2 nats, likelihood drop 1.5 nats"
    assert measured_line({}) == "nothing measured"
