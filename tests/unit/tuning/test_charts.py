"""The charts of a sweep: what is in them is what the trials have."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dpo_ray.report.document import Chart
from dpo_ray.report.vega import drawing
from tests.unit.tuning.sweeps import (
    ACCURACIES,
    DIVERGED,
    GRID,
    LOSSES,
    STOPPED,
    TWO,
    Random,
    accuracy,
    config_of,
    finished,
    grid_trials,
    measures,
    random_trials,
    trial_of,
)
from tuning.charts import importances, learning_curves, pareto
from tuning.coordinates import LACKING, parallel_coordinates
from tuning.heat_map import STAR, heat_maps
from tuning.measures import score
from tuning.objectives import shown_objectives
from tuning.space import drawn, points


def values(chart: Chart | None) -> list[dict[str, Any]]:
    assert chart is not None
    found: list[dict[str, Any]] = chart.spec["data"]["values"]
    return found


def test_of_a_grid_each_cell_has_its_trials_value_and_says_what_became_of_it_otherwise():
    [chart] = heat_maps(GRID.tune, grid_trials())
    cells = {(one["x"], one["y"]): one for one in values(chart)}
    betas, rates = ("0.05", "0.1", "0.5"), ("1e-7", "1e-6", "1e-5")
    assert cells.keys() == {(beta, rate) for beta in betas for rate in rates}
    for number, right in enumerate(ACCURACIES):
        cell = cells[betas[number // 3], rates[number % 3]]
        if right is not None and number not in STOPPED:
            assert (cell["value"], cell["trial"]) == (right, number) and f"{right:.3f}" in cell["text"]
        else:
            assert "value" not in cell
    assert cells["0.1", "1e-6"]["text"] == f"{STAR} 0.740" and cells["0.5", "1e-6"]["text"] == "0.730"
    assert cells["0.05", "1e-5"]["text"] == "diverged" and cells["0.5", "1e-5"]["text"] == "stopped at 40"
    first = chart.spec["layer"][0]["encoding"]
    assert (first["x"]["title"], first["y"]["title"]) == ("train.loss.beta", "train.learning_rate")
    assert first["x"]["sort"] == list(betas) and first["y"]["sort"] == list(rates)[::-1]


def test_the_trial_that_was_chosen_is_marked_though_another_value_is_higher():
    [chart] = heat_maps(GRID.tune, grid_trials(), best=7)
    assert [one["trial"] for one in values(chart) if STAR in one["text"]] == [7]


def test_of_ranges_each_loss_has_a_chart_with_its_trials_at_their_values():
    trials = random_trials(LOSSES, 40)
    charts = {chart.title.rpartition(" ")[2]: chart for chart in heat_maps(LOSSES.tune, trials)}
    assert charts.keys() == {"sigmoid", "ipo"}  # orpo has no β
    best = max(finished(trials), key=accuracy)
    for loss, chart in charts.items():
        mine = {t.number: t for t in trials if t.point["train.loss"] == loss}
        shown = {one["trial"]: one for one in values(chart)}
        assert shown.keys() == mine.keys()
        for number, trial in mine.items():
            one = shown[number]
            assert (one["x"], one["y"]) == (trial.point[f"train.loss[{loss}].beta"], trial.point["train.learning_rate"])
            assert one.get("value") == (accuracy(trial) if trial.state == "finished" else None)
            assert one["state"] == trial.state and one["best"] == (number == best.number)
        axes = chart.spec["layer"][0]["encoding"]
        assert axes["x"]["scale"] == axes["y"]["scale"] == {"type": "log"}


def test_without_beta_the_heat_map_is_of_the_numbers_that_matter_most():
    space = {
        "train.weight_decay": {"uniform": [0.0, 0.1]},
        "train.warmup_fraction": {"uniform": [0.0, 0.5]},
        "train.learning_rate": {"loguniform": [1e-7, 1e-4]},
        "train.schedule": ["cosine", "constant"],
    }
    config = config_of({"search": "random", "num_trials": 60, "space": space})
    assert config.tune is not None
    trials = []
    for number in range(60):
        draw = Random(number)
        drawn(config.tune.searched(), draw)
        far = abs(math.log10(draw.point["train.learning_rate"] / 3e-6)) + 3 * abs(
            draw.point["train.warmup_fraction"] - 0.3
        )
        trials.append(trial_of(number, draw.point, 0.8 - 0.1 * far))
    [chart] = heat_maps(config.tune, trials)
    axes = chart.spec["layer"][0]["encoding"]
    titles = {axes[name]["title"]: axes[name]["scale"] for name in ("x", "y")}
    assert titles.keys() == {"train.learning_rate", "train.warmup_fraction"}
    assert titles["train.learning_rate"] == {"type": "log"}


def test_one_number_makes_no_heat_map():
    config = config_of({"space": {"train.learning_rate": [1e-7, 1e-6], "train.schedule": ["cosine", "constant"]}})
    assert config.tune is not None
    trials = [trial_of(i, point, 0.6 + i / 100) for i, point in enumerate(points(config.tune.searched()))]
    assert heat_maps(config.tune, trials) == []
    assert parallel_coordinates(config.tune, trials) is not None


def test_of_trials_that_share_a_cell_the_best_one_is_shown():
    config = config_of({"beta": [0.1, 0.2], "learning_rate": [1e-6, 1e-5], "space": {"train.epochs": [1, 2]}})
    assert config.tune is not None
    trials = [trial_of(i, point, 0.6 + i / 100) for i, point in enumerate(points(config.tune.searched()))]
    [chart] = heat_maps(config.tune, trials)
    assert len(values(chart)) == 4
    for cell in values(chart):
        mine = [t for t in trials if float(t.point["train.loss.beta"]) == float(cell["x"])
                and float(t.point["train.learning_rate"]) == float(cell["y"])]  # fmt: skip
        assert len(mine) == 2 and cell["value"] == max(accuracy(t) for t in mine)


def test_a_line_crosses_each_axis_at_its_trials_value():
    trials = random_trials(LOSSES, 40)
    found = values(parallel_coordinates(LOSSES.tune, trials))
    betas = [v for t in trials for n, v in t.point.items() if n.endswith(".beta")]
    rates = [t.point["train.learning_rate"] for t in trials]
    scores = [accuracy(t) for t in finished(trials)]

    def share(value: float, of: list[float], scale: Any = math.log) -> float:
        low, high = scale(min(of)), scale(max(of))
        return float((scale(value) - low) / (high - low))

    axes = ["train.loss", "train.loss.beta", "train.learning_rate", "train.epochs", "train.schedule", "accuracy"]
    for trial in trials:
        loss = trial.point["train.loss"]
        beta = trial.point.get(f"train.loss[{loss}].beta")
        expected = [
            ["sigmoid", "ipo", "orpo"].index(loss) / 2,
            LACKING if beta is None else share(beta, betas),
            share(trial.point["train.learning_rate"], rates),
            (trial.point["train.epochs"] - 1) / 2,
            ["cosine", "constant"].index(trial.point["train.schedule"]),
        ]
        if trial.state == "finished":
            expected.append(share(accuracy(trial), scores, float))
        mine = [one for one in found if one["trial"] == trial.number]
        assert [one["axis"] for one in mine] == axes[: len(expected)]
        assert [one["place"] for one in mine] == list(range(len(expected)))
        assert [one["at"] for one in mine] == pytest.approx(expected)
        assert all(("value" in one) == (trial.state == "finished") for one in mine)
    best = max(finished(trials), key=accuracy)
    assert {one["trial"] for one in found if one["best"]} == {best.number}


def test_labels_of_an_axis_stand_apart():
    chart = parallel_coordinates(LOSSES.tune, random_trials(LOSSES, 60))
    assert chart is not None
    heights: dict[str, list[float]] = {}
    for tick in chart.spec["layer"][-1]["data"]["values"]:
        heights.setdefault(tick["axis"], []).append(tick["at"])
    assert len(heights) == 6
    for mine in heights.values():
        apart = [b - a for a, b in zip(sorted(mine)[:-1], sorted(mine)[1:], strict=True)]
        assert apart and min(apart) > 0.05


def test_where_less_is_better_less_is_further_up_and_brighter():
    config = config_of({"rank_by": "likelihood_drop", "beta": [0.05, 0.1, 0.5], "learning_rate": [1e-7, 1e-6]})
    assert config.tune is not None
    drops = (9.0, 4.0, 3.0, 8.0, 1.0, 2.0)
    trials = [
        trial_of(i, point, 0.6, drop=drop)
        for i, (point, drop) in enumerate(zip(points(config.tune.searched()), drops, strict=True))
    ]
    found = values(parallel_coordinates(config.tune, trials))
    ends = {one["trial"]: one["at"] for one in found if one["axis"] == "likelihood drop"}
    assert [ends[n] for n in range(6)] == pytest.approx([1 - (drop - 1) / 8 for drop in drops])
    [heat] = heat_maps(config.tune, trials)
    assert heat.spec["layer"][0]["encoding"]["color"]["scale"]["reverse"] is True
    assert [one["trial"] for one in values(heat) if STAR in one["text"]] == [4]
    curves = learning_curves(config.tune, trials)
    assert curves is not None and "lower is better" in curves.says


def test_a_curve_has_the_evaluations_of_its_trial():
    trials = grid_trials()
    chart = learning_curves(GRID.tune, trials)
    found = values(chart)
    for trial in trials:
        mine = [(one["step"], one["value"]) for one in found if one["trial"] == trial.number]
        assert mine == [(e["step"], e["measured"]["accuracy"]["value"]) for e in trial.evaluations]
    assert {one["trial"] for one in found if one["of"] == "best"} == {4}
    assert [one["high"] for one in found if one["of"] == "best"][-1] == trials[4].measured["accuracy"]["high"]
    # It was never measured, so its cross stands on the edge.
    assert chart is not None
    crosses = chart.spec["layer"][-1]["data"]["values"]
    assert [(one["trial"], one["step"]) for one in crosses] == [(DIVERGED, 13)]


def test_curves_need_two_trials_and_one_that_was_measured_twice():
    trials = grid_trials()
    assert learning_curves(GRID.tune, trials[:1]) is None
    once = [trial.model_copy(update={"evaluations": trial.evaluations[:1]}) for trial in trials]
    assert learning_curves(GRID.tune, once) is None
    ended = [trial for trial in trials if trial.state != "finished"]
    assert {one["of"] for one in values(learning_curves(GRID.tune, ended))} == {"stopped"}


def test_shares_of_importance_add_up_and_what_decides_has_the_largest():
    trials = [
        trial_of(i, point, 0.7 - 0.1 * abs(math.log10(float(point["train.learning_rate"]) / 1e-6)))
        for i, point in enumerate(points(GRID.tune.searched() if GRID.tune else {}))
    ]
    found = {one["name"]: one["value"] for one in values(importances(GRID.tune, trials))}
    assert list(found) == ["train.learning_rate", "train.loss.beta"]
    assert found["train.learning_rate"] > 0.9
    assert sum(found.values()) == pytest.approx(1.0)


def test_what_an_option_holds_has_its_importance_under_the_options_name():
    found = {one["name"]: one["value"] for one in values(importances(LOSSES.tune, random_trials(LOSSES, 40)))}
    assert found.keys() == {
        "train.loss", "train.loss[sigmoid].beta", "train.loss[ipo].beta", "train.learning_rate", "train.epochs",
        "train.schedule",
    }  # fmt: skip
    assert sum(found.values()) == pytest.approx(1.0)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_importances_need_four_finished_trials_that_differ():
    trials = finished(grid_trials())
    assert importances(GRID.tune, trials[:3]) is None
    assert importances(GRID.tune, trials[:4]) is not None
    equal = [trial.model_copy(update={"measured": measures(0.6)}) for trial in trials]
    assert importances(GRID.tune, equal) is None


def test_the_front_joins_the_trials_that_none_is_better_than():
    config = config_of({"rank_by": ["accuracy", "likelihood_drop"], "beta": [0.1, 0.2, 0.3, 0.4, 0.5]})
    assert config.tune is not None
    measured = [(0.6, 1.0), (0.7, 5.0), (0.65, 2.0), (0.64, 3.0), (0.7, 6.0)]  # the last two are beaten
    trials = [
        trial_of(i, point, right, drop=drop)
        for i, (point, (right, drop)) in enumerate(zip(points(config.tune.searched()), measured, strict=True))
    ]
    chart = pareto(config.tune, trials)
    found = values(chart)
    assert [(one["x"], one["y"]) for one in found] == measured
    assert [one["trial"] for one in found if one["of"] == "on the front"] == [0, 1, 2]
    assert [one["text"] for one in found] == ["0", f"1 {STAR}", "2", "", ""]
    for one, trial in zip(found, trials, strict=True):
        for axis, name in (("x", "accuracy"), ("y", "likelihood_drop")):
            width = one[f"{axis}_high"] - one[f"{axis}_low"]
            assert width == pytest.approx(2 * trial.measured[name]["se"])  # type: ignore[literal-required]
    assert chart is not None and "better is lower right" in chart.says


def test_one_objective_or_one_trial_has_no_front():
    assert pareto(GRID.tune, grid_trials()) is None
    assert pareto(TWO.tune, finished(random_trials(TWO, 24))[:1]) is None


def test_nothing_is_drawn_of_fewer_than_two_finished_trials():
    trials = [trial for trial in grid_trials() if trial.number in {DIVERGED, *STOPPED, 4}]
    for few in (trials, []):
        assert not heat_maps(GRID.tune, few)
        assert all(plot(GRID.tune, few) is None for plot in (parallel_coordinates, pareto, importances))
    assert learning_curves(GRID.tune, []) is None


def test_what_is_not_finite_is_not_drawn():
    trials = grid_trials()
    trials[4].measured["accuracy"]["value"] = math.nan
    [heat] = heat_maps(GRID.tune, trials)
    texts = [one["text"] for one in values(heat)]
    assert f"{STAR} 0.730" in texts and not any("nan" in text for text in texts)
    assert 4 not in {one["trial"] for one in values(parallel_coordinates(GRID.tune, trials))}


def test_options_of_one_type_are_named_by_what_tells_them_apart():
    options = [
        {"type": "sigmoid", "beta": {"choice": [0.1, 0.2]}},
        {"type": "sigmoid", "beta": {"choice": [0.3, 0.4]}},
        {"type": "sigmoid", "label_smoothing": 0.1},
    ]
    config = config_of({"space": {"train.loss": options}})
    assert config.tune is not None
    trials = [trial_of(i, point, 0.6 + i / 100) for i, point in enumerate(points(config.tune.searched()))]
    chart = parallel_coordinates(config.tune, trials)
    assert chart is not None
    ticks = [one["is"] for one in chart.spec["layer"][-1]["data"]["values"] if one["axis"] == "train.loss"]
    assert ticks == ["1: sigmoid, beta …", "2: sigmoid, beta …", "sigmoid, label_smoothing …"]


def test_every_chart_of_a_sweep_can_be_drawn():
    trials = random_trials(TWO, 24)
    charts = [
        *heat_maps(GRID.tune, grid_trials()), *heat_maps(TWO.tune, trials), pareto(TWO.tune, trials),
        parallel_coordinates(TWO.tune, trials), learning_curves(TWO.tune, trials), importances(TWO.tune, trials),
    ]  # fmt: skip
    for chart in charts:
        assert chart is not None and drawing(chart.spec, "c").count("<path") > 5, chart


@pytest.mark.parametrize(
    "rank_by", ["accuracy", "likelihood_drop", {"likelihood_drop": 2.0}, {"accuracy": 1.0, "likelihood_drop": 0.5}]
)
def test_an_objective_is_shown_in_its_own_direction(rank_by: Any):
    tune = config_of({"beta": [0.1, 0.2], "rank_by": rank_by}).tune
    assert tune is not None
    [objective] = shown_objectives(tune)
    found = measures(0.7, margin=1.5, drop=2.5)
    scored, shown = score(tune.objectives()[0], found), objective.of(found)
    assert scored is not None and shown is not None
    assert objective.of_score(scored) == pytest.approx((shown["value"], shown["se"]))
    if rank_by in ("likelihood_drop", {"likelihood_drop": 2.0}):
        assert shown["value"] == 2.5 and not objective.higher_is_better
    if len(tune.objectives()[0]) == 2:
        assert objective.label == "held-out accuracy − 0.5·likelihood drop (weighted sum)"
        assert shown["value"] == pytest.approx(0.7 - 1.25)
