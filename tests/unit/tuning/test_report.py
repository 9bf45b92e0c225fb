"""The page of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dpo_ray.config import Config
from dpo_ray.report.document import Chart, Code, Document, Paragraph, Section, Table
from dpo_ray.report.page import html_page, markdown_page
from tests.unit.tuning.sweeps import (
    DIVERGED,
    GRID,
    LOSSES,
    STOPPED,
    TWO,
    accuracy,
    config_of,
    finished,
    grid_trials,
    random_trials,
    trial_of,
)
from tuning.records import Trial
from tuning.report import sweep_sections
from tuning.results import ranked
from tuning.space import points

FINAL = {"value": 0.7051, "low": 0.6352, "high": 0.7653, "n": 181}
RANKED = {"value": 0.7402, "low": 0.6951, "high": 0.7804, "n": 400}


class Read:
    """Rows of each table with their head, what charts say, and all else that stands in the sections."""

    def __init__(self, sections: Sequence[Section]) -> None:
        blocks = [block for section in sections for block in section.blocks]
        self.charts = [block for block in blocks if isinstance(block, Chart)]
        self.says = [chart.says for chart in self.charts]
        self.tables = [[list(row) for row in (b.head, *b.rows)] for b in blocks if isinstance(b, Table)]
        texts = [block.text for block in blocks if isinstance(block, Paragraph | Code)]
        self.text = "\n".join([*(section.title for section in sections), *texts])

    def table(self, first: str) -> list[list[str]]:
        """Rows of the table whose first heading this is, the heading included."""
        [found] = [rows for rows in self.tables if rows[0][0] == first]
        return found

    def column(self, name: str) -> list[str]:
        """Of the table of all trials."""
        heading, *rows = self.table("place")
        return [row[heading.index(name)] for row in rows]


def page(config: Config, trials: Sequence[Trial], repeats: Sequence[Trial] = (), **chosen: Any) -> list[Section]:
    assert config.tune is not None
    ranking = ranked(config.tune, trials, repeats)
    best = None
    if ranking:
        number = ranking[0].trial.number
        best = {"number": number, "accuracy": FINAL, "win_rate": None, "ranked_accuracy": RANKED, **chosen}
    return sweep_sections(config, trials, repeats, ranking, best, "o/runs/r/best.yaml")


def grid_repeats() -> list[Trial]:
    """Trials 4 and 7 with two other seeds each, by which 7 is the better one."""
    trials = grid_trials()
    found = ((4, 1, 0.72), (4, 2, 0.70), (7, 1, 0.74), (7, 2, 0.735))
    return [trial_of(number, trials[number].point, right, seed=seed) for number, seed, right in found]


def test_the_chosen_trial_is_shown_with_its_values_and_the_estimate_that_nothing_was_ranked_by():
    read = Read(page(GRID, grid_trials()))
    assert "Chosen: trial 4" in read.text
    values = next(rows for rows in read.tables if rows[0] == ["path", "value"])
    assert values[1:] == [["train.loss.beta", "0.1"], ["train.learning_rate", "1e-6"]]
    assert "dpo-ray run o/runs/r/best.yaml" in read.text
    [_, final] = read.table("on held-out pairs that no trial was ranked by")
    assert final == ["preference accuracy", "0.705", "0.635 to 0.765", "181"]
    assert "may well be lower" in read.text and "the best of 6 trials" in read.text and "winner's curse" in read.text
    assert "0.740 [0.695, 0.780]" in read.text
    assert ["held-out accuracy (share of pairs)", "0.740 [0.695, 0.781]"] in read.table("what it was ranked by")


def test_a_win_rate_is_final_too_and_what_was_not_measured_is_absent():
    rate = {"value": 0.61, "low": 0.55, "high": 0.67, "n": 256}
    read = Read(page(GRID, grid_trials(), accuracy=None, win_rate=rate))
    [_, *finals] = read.table("on held-out pairs that no trial was ranked by")
    assert finals == [["win rate against the base model", "0.610", "0.550 to 0.670", "256"]]
    none = Read(page(GRID, grid_trials(), accuracy=None))
    assert "There is no final estimate" in none.text and "winner's curse" in none.text
    assert not any("no trial was ranked by" in rows[0][0] for rows in none.tables)


def test_a_single_finished_trial_has_no_winners_curse():
    read = Read(page(GRID, grid_trials()[:1]))
    assert "winner's curse" not in read.text
    assert "Only trial 0 finished: there is nothing to compare it with." in read.text


def test_ties_are_named():
    assert "In accuracy, trial 7 cannot be told from trial 4, the best, at 95%" in Read(page(GRID, grid_trials())).text
    trials = grid_trials()
    trials[1] = trial_of(1, trials[1].point, 0.735)
    assert "trials 1 and 7 cannot be told from trial 4" in Read(page(GRID, trials)).text
    trials[1], trials[7] = trial_of(1, trials[1].point, 0.6), trial_of(7, trials[7].point, 0.61)
    read = Read(page(GRID, trials))
    assert "trial 4 differs from every other finished one" in read.text
    assert not any("tied" in state for state in read.column("state"))


def test_the_table_has_the_ranking_first_and_then_what_did_not_finish():
    read = Read(page(GRID, grid_trials()))
    assert read.column("trial") == [str(number) for number in (4, 7, 1, 3, 0, 6, *STOPPED, DIVERGED)]
    assert read.column("place") == [*"123456", "–", "–", "–"]
    assert read.column("state") == [
        "finished, best", "finished, tied with the best", *["finished"] * 4, "stopped", "stopped", "diverged",
    ]  # fmt: skip
    assert read.column("train.loss.beta") == ["0.1", "0.5", "0.05", "0.1", "0.05", "0.5", "0.1", "0.5", "0.05"]
    assert read.column("steps") == [*["100/100"] * 6, "40/100", "40/100", "13/100"]
    assert read.column("seconds") == [*["60"] * 6, "24", "24", "9"]
    assert read.column("accuracy (share of pairs)")[::8] == ["0.740 [0.695, 0.781]", "–"]
    assert read.column("reason")[-2:] == ["Among the worse at step 40.", "The loss is nan at step 13."]
    assert "9 trials: 6 finished, 2 stopped by the scheduler, 1 diverged." in read.text


def test_trials_that_were_repeated_are_shown_by_their_mean_over_the_seeds():
    read = Read(page(GRID, grid_trials(), grid_repeats()))
    assert "Chosen: trial 7" in read.text
    assert ["held-out accuracy (share of pairs), mean ± standard deviation over 3 seeds", "0.7350 ± 0.0050"] in (
        read.table("what it was ranked by")
    )
    assert read.column("trial")[:3] == ["7", "4", "1"]
    assert read.column("mean accuracy ± deviation (seeds)")[:3] == ["0.7350 ± 0.0050 (3)", "0.720 ± 0.020 (3)", "–"]
    assert "Trials that were repeated with other seeds come before the others" in read.text
    [_, *rows] = read.table("trial")
    assert [row[:4] for row in rows] == [
        ["4", "1", "finished", "0.720 [0.674, 0.762]"],
        ["4", "2", "finished", "0.700 [0.653, 0.743]"],
        ["7", "1", "finished", "0.740 [0.695, 0.781]"],
        ["7", "2", "finished", "0.735 [0.690, 0.776]"],
    ]
    assert "the marked trial is the best by its mean over all of its seeds" in read.says[0]
    plain = Read(page(GRID, grid_trials()))
    assert "trial" not in [rows[0][0] for rows in plain.tables] and "mean" not in plain.says[0]


def test_reasons_are_text_and_never_markup():
    trials = grid_trials()
    trials[DIVERGED].reason = "<script>alert('trial')</script>"
    document = Document("t", "v", "plain", [], [], sections=page(GRID, trials))
    html, markdown = html_page(document), markdown_page(document)
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "\\<script\\>alert" in markdown
    assert html.count('class="plot"') == len(document.charts) > 2


def test_trials_of_different_beta_are_never_to_be_ranked_by_loss_or_margin():
    assert "Never rank trials of different β" in Read(page(GRID, grid_trials())).text


def test_forty_trials_with_conditional_losses():
    trials = random_trials(LOSSES, 40)
    read = Read(page(LOSSES, trials))
    best = max(finished(trials), key=accuracy)
    assert f"Chosen: trial {best.number}" in read.text
    heading, *rows = read.table("place")
    assert len(rows) == 40
    paths = ["train.loss.type", "train.loss.beta", "train.learning_rate", "train.epochs", "train.schedule"]
    assert heading[3:8] == paths
    by_number = dict(
        zip(read.column("trial"), zip(read.column(paths[0]), read.column(paths[1]), strict=True), strict=True)
    )
    for trial in trials:
        loss, beta = by_number[str(trial.number)]
        assert loss == trial.point["train.loss"]
        assert (beta == "–") == (loss == "orpo")
    values = [accuracy(t) for t in sorted(finished(trials), key=accuracy, reverse=True)]
    shown = [float(cell.split()[0]) for cell in read.column("accuracy (share of pairs)")[: len(values)]]
    assert shown == pytest.approx(values, abs=5e-4)
    states = [state.split(",")[0] for state in read.column("state")]
    order = ["finished", "stopped", "diverged", "failed"]
    assert states == sorted(states, key=order.index) and set(states) == set(order)
    [_, loss, rate, epochs, schedule] = next(rows for rows in read.tables if rows[0] == ["path", "values"])
    assert loss == [
        "train.loss",
        "one of: {type: sigmoid, beta: log-uniform, 0.01 to 0.5}; {type: ipo, beta: log-uniform, 0.05 to 1}; "
        "{type: orpo}",
    ]
    assert [rate[1], epochs[1], schedule[1]] == [
        "log-uniform, 1e-7 to 1e-4", "whole numbers, 1 to 3", "one of: cosine, constant",
    ]  # fmt: skip
    assert "Random search" in read.text and "every trial trained to its first evaluation" in read.text
    titles = [chart.title for chart in read.charts]
    assert titles == [
        *("Where the best trials lie: ipo", "Where the best trials lie: sigmoid", "Which values the best trials share"),
        *("How trials went on", "Which values decide"),
    ]


def test_two_objectives_have_a_front():
    trials = random_trials(TWO, 24)
    read = Read(page(TWO, trials))
    on_front = [n for n, s in zip(read.column("trial"), read.column("state"), strict=True) if "on the front" in s]
    assert len(on_front) > 1 and read.column("trial")[: len(on_front)] == on_front
    assert f"The Pareto front is trials {', '.join(on_front[:-1])} and {on_front[-1]}" in read.text
    assert "1. held-out accuracy (share of pairs), higher is better; 2. held-out likelihood drop" in read.text
    assert len(read.charts) == 5
    assert any("that none is better than in both objectives" in says for says in read.says)


def test_a_weighted_sum_has_a_column_beside_its_measures():
    config = config_of({"rank_by": {"accuracy": 1.0, "likelihood_drop": 0.1}, "beta": [0.1, 0.2]})
    assert config.tune is not None
    trials = [
        trial_of(i, point, 0.7, drop=drop)
        for i, (point, drop) in enumerate(zip(points(config.tune.searched()), (3.0, 1.0), strict=True))
    ]
    read = Read(page(config, trials))
    assert read.column("trial") == ["1", "0"]
    sums = [float(cell.split()[0]) for cell in read.column("accuracy − 0.1·likelihood drop (weighted sum)")]
    assert sums == pytest.approx([0.6, 0.4])
    assert read.column("likelihood drop (nats a chosen answer)")[0].startswith("1.00 [")


@pytest.mark.parametrize(
    ("scheduler", "sentence"),
    [
        ("fifo", "every trial was to train to its end"),
        ({"type": "asha", "grace_steps": 40, "reduction_factor": 4}, "trained to step 40, and from there on"),
        ({"type": "median", "min_trials": 5}, "of 5 others at least"),
    ],
)
def test_how_trials_were_ended_is_told(scheduler: Any, sentence: str):
    config = config_of({"beta": [0.1, 0.2], "scheduler": scheduler, "ranked_fraction": 0.3})
    assert config.tune is not None
    trials = [trial_of(i, point, 0.6) for i, point in enumerate(points(config.tune.searched()))]
    text = Read(page(config, trials)).text
    assert sentence in text
    assert "Measured on 30% of the held-out prompts; the other 70% judge the model that was chosen" in text


def test_where_nothing_finished_the_page_says_so_and_shows_what_there_is():
    trials = [trial for trial in grid_trials() if trial.state != "finished"]
    read = Read(page(GRID, trials))
    assert "No trial finished, so none was chosen." in read.text
    assert "winner's curse" not in read.text and "Which trials are as good" not in read.text
    assert read.column("trial") == [str(number) for number in (*STOPPED, DIVERGED)]
    assert [chart.title for chart in read.charts] == ["How trials went on"]
    nothing = Read(page(GRID, []))
    assert "No trial was begun." in nothing.text and nothing.says == []
