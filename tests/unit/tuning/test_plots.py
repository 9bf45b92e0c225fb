"""The plots of a sweep: what is drawn is what the trials have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dpo_ray.config import Config, parse_config
from dpo_ray.config.tune import Range
from tuning.measures import Measured, measured, score
from tuning.plots import heat_map, importances, learning_curves, parallel_coordinates, pareto, shown_objectives
from tuning.records import Trial
from tuning.space import Point, drawn, points

PAIRS = 400  # that each measure is over


def config_of(tune: Mapping[str, Any]) -> Config:
    """A configuration with this section tune."""
    return parse_config(
        {
            "run": {"name": "searched", "output": "o"},
            "model": {"path": "base"},
            "data": {"train": "t"},
            "train": {"eval_every_steps": 20},
            "tune": dict(tune),
        }
    )


def measures(accuracy: float, margin: float = 1.0, drop: float = 2.0) -> Measured:
    """As an evaluation gives them."""
    return measured(
        {
            "eval_pairs": PAIRS,
            "eval_rewards/accuracies": accuracy,
            "eval_margins": margin,
            "eval_margins_se": 0.1,
            "eval_logratios/chosen": -drop,
            "eval_logratios/chosen_se": 0.2,
        }
    )


def trial_of(number: int, point: Point, accuracy: float | None = None, **fields: Any) -> Trial:
    """A trial of 100 steps that has come to `step` (all of them), evaluated each 20 steps on its way to `accuracy`."""
    others = {key: fields.pop(key) for key in ("margin", "drop") if key in fields}
    fields = {"state": "finished", "step": 100, "num_steps": 100, "seed": 0, "seconds": 60.0, **fields}
    if accuracy is None:
        return Trial(number=number, point=point, **fields)
    on_the_way = [
        {"step": s, "loss": 0.7 - s / 1000, "measured": measures(0.5 + (accuracy - 0.5) * s / fields["step"], **others)}
        for s in range(20, fields["step"] + 1, 20)
    ]
    return Trial(number=number, point=point, evaluations=on_the_way, measured=measures(accuracy, **others), **fields)


GRID = config_of(
    {"beta": [0.05, 0.1, 0.5], "learning_rate": [1e-7, 1e-6, 1e-5], "scheduler": {"type": "asha", "grace_steps": 20}}
)
ACCURACIES = (0.61, 0.66, None, 0.63, 0.74, 0.58, 0.60, 0.73, 0.57)
STOPPED, DIVERGED = (5, 8), 2


def grid_trials() -> list[Trial]:
    """A grid of 3 × 3: trial 4 the best and 7 as good, 5 and 8 stopped after 40 steps, 2 diverged before it was
    measured."""
    assert GRID.tune is not None
    trials = []
    for number, (point, accuracy) in enumerate(zip(points(GRID.tune.searched()), ACCURACIES, strict=True)):
        fields: dict[str, Any] = {}
        if number in STOPPED:
            fields = {"state": "stopped", "step": 40, "seconds": 24.0, "reason": "Among the worse at step 40."}
        elif number == DIVERGED:
            fields = {"state": "diverged", "step": 13, "seconds": 9.0, "reason": "The loss is nan at step 13."}
        trials.append(trial_of(number, point, accuracy, **fields))
    return trials


LOSSES = config_of(
    {
        "search": "random",
        "num_trials": 40,
        "scheduler": "asha",
        "space": {
            "train.loss": {
                "choice": [
                    {"type": "sigmoid", "beta": {"loguniform": [0.01, 0.5]}},
                    {"type": "ipo", "beta": {"loguniform": [0.05, 1.0]}},
                    {"type": "orpo"},
                ]
            },
            "train.learning_rate": {"loguniform": [1e-7, 1e-4]},
            "train.epochs": {"integer": [1, 3]},
            "train.schedule": ["cosine", "constant"],
        },
    }
)


class Random:
    """Values by chance."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.point: Point = {}

    def number(self, name: str, found: Range) -> float | int:
        if found.kind == "integer":
            value: float | int = int(self._random.integers(int(found.low), int(found.high) + 1))
        elif found.kind == "loguniform":
            value = math.exp(self._random.uniform(math.log(found.low), math.log(found.high)))
        else:
            value = self._random.uniform(found.low, found.high)
        self.point[name] = value
        return value

    def label(self, name: str, labels: list[str]) -> str:
        self.point[name] = str(self._random.choice(labels))
        return str(self.point[name])


def random_trials(config: Config, count: int) -> list[Trial]:
    """Trials of which the best have a learning rate near 5e-6; the largest ones diverge, and some are stopped."""
    assert config.tune is not None
    trials = []
    for number in range(count):
        draw = Random(number)
        drawn(config.tune.searched(), draw)
        far = abs(math.log10(draw.point["train.learning_rate"] / 5e-6))
        noise = 0.02 * math.sin(7 * number)
        accuracy = 0.75 - 0.1 * far + noise + 0.03 * (draw.point.get("train.loss") == "sigmoid")
        others = {"margin": 2.0 - 0.5 * far + 5 * noise, "drop": 6.0 - 2.0 * far - 20 * noise}
        if draw.point["train.learning_rate"] > 4e-5:
            trials.append(trial_of(number, draw.point, 0.5, state="diverged", step=31, reason="The loss is nan."))
        elif far > 0.8 and number % 2:
            trials.append(trial_of(number, draw.point, accuracy - 0.05, **others, state="stopped", step=40))
        elif number == 11:
            trials.append(trial_of(number, draw.point, state="failed", step=0, reason="A worker died."))
        else:
            trials.append(trial_of(number, draw.point, accuracy, **others))
    return trials


TWO = config_of(
    {
        "search": "tpe",
        "num_trials": 24,
        "rank_by": ["accuracy", "likelihood_drop"],
        "space": {"train.loss.beta": {"loguniform": [0.01, 0.5]}, "train.learning_rate": {"loguniform": [1e-7, 1e-4]}},
    }
)


def finished(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state == "finished"]


def accuracy(trial: Trial) -> float:
    return trial.measured["accuracy"]["value"]


def drawn_by(figure: Figure | None) -> Figure:
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def points_of(axes: Axes, label: str) -> PathCollection:
    [found] = [one for one in axes.collections if one.get_label() == label]
    assert isinstance(found, PathCollection)
    return found


def line_of(axes: Axes, number: int) -> Line2D:
    [found] = [line for line in axes.lines if line.get_label() == f"_trial {number}"]
    return found


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_of_a_grid_each_cell_has_its_trials_value_and_says_what_became_of_it_otherwise():
    figure = drawn_by(heat_map(GRID.tune, grid_trials()))
    axes, _ = figure.axes  # the other one is the colour bar
    [mesh] = [one for one in axes.collections if isinstance(one, QuadMesh)]
    by_cell = np.reshape([math.nan if a is None else a for a in ACCURACIES], (3, 3)).T.copy()
    by_cell[2, 1] = by_cell[2, 2] = math.nan  # what was stopped has no colour, though it was measured
    np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), math.nan), by_cell)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.05", "0.1", "0.5"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["1e-7", "1e-6", "1e-5"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("train.loss.beta", "train.learning_rate")
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[0, 0] == "0.610" and texts[1, 1] == "★ 0.740" and texts[2, 1] == "0.730"
    assert texts[0, 2] == "diverged" and texts[1, 2] == texts[2, 2] == "stopped\nat step 40"


def test_the_trial_that_was_chosen_is_marked_though_another_value_is_higher():
    figure = drawn_by(heat_map(GRID.tune, grid_trials(), best=7))
    assert [t.get_position() for t in figure.axes[0].texts if "★" in t.get_text()] == [(2, 1)]


def test_of_ranges_each_loss_has_a_panel_with_its_trials_at_their_values():
    trials = random_trials(LOSSES, 40)
    figure = drawn_by(heat_map(LOSSES.tune, trials))
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_xlabel()}
    assert panels.keys() == {"sigmoid", "ipo"}  # orpo has no β
    best = max(finished(trials), key=accuracy)
    for loss, axes in panels.items():
        mine = [t for t in trials if t.point["train.loss"] == loss]
        at = {t.number: (t.point[f"train.loss[{loss}].beta"], t.point["train.learning_rate"]) for t in mine}
        shown = points_of(axes, "_finished")
        values = dict(zip(map(tuple, shown.get_offsets().tolist()), shown.get_array().tolist(), strict=True))
        assert values == {at[t.number]: accuracy(t) for t in finished(mine)}
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        for state in ("stopped", "diverged", "failed"):
            lines = [line for line in axes.lines if line.get_label() == f"_{state}"]
            drawn = {tuple(xy) for line in lines for xy in line.get_xydata().tolist()}
            assert drawn == {at[t.number] for t in mine if t.state == state}
        if loss == best.point["train.loss"]:
            assert points_of(axes, "_best").get_offsets().tolist() == [list(at[best.number])]
    placed = [t for t in trials if t.point["train.loss"] != "orpo"]
    assert legend_of(figure) == [
        f"{state} ({sum(t.state == state for t in placed)})" for state in ("stopped", "failed", "diverged")
    ]


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
    axes = drawn_by(heat_map(config.tune, trials)).axes[0]
    assert {axes.get_xlabel(), axes.get_ylabel()} == {"train.learning_rate", "train.warmup_fraction"}
    assert (axes.get_xlabel(), axes.get_xscale()) == ("train.learning_rate", "log") or axes.get_yscale() == "log"


def test_one_number_makes_no_heat_map():
    config = config_of({"space": {"train.learning_rate": [1e-7, 1e-6], "train.schedule": ["cosine", "constant"]}})
    assert config.tune is not None
    trials = [trial_of(i, point, 0.6 + i / 100) for i, point in enumerate(points(config.tune.searched()))]
    assert heat_map(config.tune, trials) is None
    assert parallel_coordinates(config.tune, trials) is not None


def test_of_trials_that_share_a_cell_the_best_one_is_shown():
    config = config_of({"beta": [0.1, 0.2], "learning_rate": [1e-6, 1e-5], "space": {"train.epochs": [1, 2]}})
    assert config.tune is not None
    trials = [trial_of(i, point, 0.6 + i / 100) for i, point in enumerate(points(config.tune.searched()))]
    axes = drawn_by(heat_map(config.tune, trials)).axes[0]
    cells: dict[tuple[int, int], float] = {}
    for trial in trials:
        cell = (["0.1", "0.2"].index(trial.point["train.loss.beta"]),
                ["1e-06", "1e-05"].index(trial.point["train.learning_rate"]))  # fmt: skip
        cells[cell] = max(cells.get(cell, 0.0), accuracy(trial))
    texts = {text.get_position(): float(text.get_text().removeprefix("★ ")) for text in axes.texts}
    assert texts == pytest.approx(cells)


SPREAD = 0.05  # by which lines of the same value are set apart, at most


def test_a_line_crosses_each_axis_at_its_trials_value():
    trials = random_trials(LOSSES, 40)
    axes = drawn_by(parallel_coordinates(LOSSES.tune, trials)).axes[0]
    titles = [label.get_text().replace("\n", "") for label in axes.get_xticklabels()]
    assert titles[:-1] == ["train.loss", "train.loss.beta", "train.learning_rate", "train.epochs", "train.schedule"]
    assert "accuracy" in titles[-1] and "share of pairs" in titles[-1]
    betas = [v for t in trials for n, v in t.point.items() if n.endswith(".beta")]
    rates = [t.point["train.learning_rate"] for t in trials]
    scores = [accuracy(t) for t in finished(trials)]

    def share(value: float, values: list[float], scale: Any = math.log) -> float:
        low, high = scale(min(values)), scale(max(values))
        return float((scale(value) - low) / (high - low))

    dash = next(text.get_position()[1] for text in axes.texts if text.get_text() == "–")
    assert dash < -SPREAD
    for trial in trials:
        loss = trial.point["train.loss"]
        beta = trial.point.get(f"train.loss[{loss}].beta")
        expected = [
            ["sigmoid", "ipo", "orpo"].index(loss) / 2,
            dash if beta is None else share(beta, betas),
            share(trial.point["train.learning_rate"], rates),
            (trial.point["train.epochs"] - 1) / 2,
            ["cosine", "constant"].index(trial.point["train.schedule"]),
        ]
        if trial.state == "finished":
            expected.append(share(accuracy(trial), scores, float))
        line = line_of(axes, trial.number)
        assert line.get_xdata().tolist() == list(range(len(expected)))
        assert line.get_ydata().tolist() == pytest.approx(expected, abs=SPREAD)
        if trial.state == "diverged":
            assert line.get_linestyle() == "--"
    best = max(finished(trials), key=accuracy)
    widths = {trial.number: line_of(axes, trial.number).get_linewidth() for trial in trials}
    assert max(widths, key=lambda number: widths[number]) == best.number
    assert all(widths[t.number] < 1 for t in trials if t.state != "finished")
    labels = {(round(text.get_position()[0]), text.get_text()) for text in axes.texts}
    assert {(0, "sigmoid"), (0, "ipo"), (0, "orpo"), (3, "1"), (3, "3"), (4, "constant"), (1, "–")} <= labels
    assert (0, "–") not in labels


def test_labels_of_an_axis_stand_apart():
    axes = drawn_by(parallel_coordinates(LOSSES.tune, random_trials(LOSSES, 60))).axes[0]
    heights: dict[int, list[float]] = {}
    for text in axes.texts:
        heights.setdefault(round(text.get_position()[0]), []).append(text.get_position()[1])
    for mine in heights.values():
        assert len(mine) > 1 and min(np.diff(sorted(mine))) > 0.05


def test_where_less_is_better_less_is_further_up_and_brighter():
    config = config_of({"rank_by": "likelihood_drop", "beta": [0.05, 0.1, 0.5], "learning_rate": [1e-7, 1e-6]})
    assert config.tune is not None
    drops = (9.0, 4.0, 3.0, 8.0, 1.0, 2.0)
    trials = [
        trial_of(i, point, 0.6, drop=drop)
        for i, (point, drop) in enumerate(zip(points(config.tune.searched()), drops, strict=True))
    ]
    axes = drawn_by(parallel_coordinates(config.tune, trials)).axes[0]
    ends = [line_of(axes, trial.number).get_ydata()[-1] for trial in trials]
    assert ends == pytest.approx([1 - (drop - 1) / 8 for drop in drops])
    red, green, blue, _ = line_of(axes, 4).get_color()
    assert red > 0.9 and green > 0.8 and blue < 0.3  # viridis is yellow at its bright end
    heat = drawn_by(heat_map(config.tune, trials)).axes[0]
    assert [t.get_position() for t in heat.texts if t.get_text() == "★ 1.00"] == [(2, 0)]
    [curves] = drawn_by(learning_curves(config.tune, trials)).axes
    assert curves.get_ylabel() == "held-out likelihood drop (nats a chosen answer)\nlower is better"


def test_a_curve_has_the_evaluations_of_its_trial():
    trials = grid_trials()
    figure = drawn_by(learning_curves(GRID.tune, trials))
    [axes] = figure.axes
    for trial in trials:
        if trial.number == DIVERGED:
            continue
        measured = [(e["step"], e["measured"]["accuracy"]["value"]) for e in trial.evaluations]
        assert [tuple(xy) for xy in line_of(axes, trial.number).get_xydata().tolist()] == measured
    widths = [line_of(axes, trial.number).get_linewidth() for trial in trials if trial.number != DIVERGED]
    assert max(widths) == line_of(axes, 4).get_linewidth() and widths.count(max(widths)) == 1
    [band] = axes.collections
    assert band.get_datalim(axes.transData).y1 == pytest.approx(trials[4].measured["accuracy"]["high"])
    # It was never measured, so its cross stands on the edge.
    assert [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "x"] == [[[13.0, 0.0]]]
    assert legend_of(figure) == ["trial 4, the best", "finished (5)", "stopped (2)", "diverged (1)"]


def test_curves_need_two_trials_and_one_that_was_measured_twice():
    trials = grid_trials()
    assert learning_curves(GRID.tune, trials[:1]) is None
    once = [trial.model_copy(update={"evaluations": trial.evaluations[:1]}) for trial in trials]
    assert learning_curves(GRID.tune, once) is None
    ended = [trial for trial in trials if trial.state != "finished"]
    assert legend_of(drawn_by(learning_curves(GRID.tune, ended))) == ["stopped (2)", "diverged (1)"]


def bars_of(figure: Figure) -> dict[str, float]:
    [axes] = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    return {name: bar.get_width() for name, bar in zip(names, axes.patches, strict=True)}


def test_shares_of_importance_add_up_and_what_decides_has_the_largest():
    trials = [
        trial_of(i, point, 0.7 - 0.1 * abs(math.log10(float(point["train.learning_rate"]) / 1e-6)))
        for i, point in enumerate(points(GRID.tune.searched() if GRID.tune else {}))
    ]
    found = bars_of(drawn_by(importances(GRID.tune, trials)))
    assert list(found) == ["train.learning_rate", "train.loss.beta"]
    assert found["train.learning_rate"] > 0.9
    assert sum(found.values()) == pytest.approx(1.0)


def test_what_an_option_holds_has_its_importance_under_the_options_name():
    found = bars_of(drawn_by(importances(LOSSES.tune, random_trials(LOSSES, 40))))
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
    figure = drawn_by(pareto(config.tune, trials))
    [axes] = figure.axes
    assert [tuple(xy) for xy in points_of(axes, "finished").get_offsets().tolist()] == measured
    front = [line for line in axes.lines if line.get_label().startswith("_child") and len(line.get_xdata()) == 3]
    assert [[tuple(xy) for xy in line.get_xydata().tolist()] for line in front] == [
        [measured[0], measured[2], measured[1]]
    ]
    assert [text.get_text() for text in axes.texts] == ["0", "2", "1"]
    across, up = [one for one in axes.collections if not isinstance(one, PathCollection)]
    for bars, axis, name in ((across, 0, "accuracy"), (up, 1, "likelihood_drop")):
        lengths = [float(np.ptp(path.vertices[:, axis])) for path in bars.get_paths()]
        assert lengths == pytest.approx([2 * trial.measured[name]["se"] for trial in trials])
    assert axes.get_xlabel() == "held-out accuracy (share of pairs), higher is better"
    assert axes.get_ylabel() == "held-out likelihood drop (nats a chosen answer)\nlower is better"
    assert axes.get_title().endswith("better is lower right")
    assert "trial 1, the best" in legend_of(figure)


def test_one_objective_or_one_trial_has_no_front():
    assert pareto(GRID.tune, grid_trials()) is None
    assert pareto(TWO.tune, finished(random_trials(TWO, 24))[:1]) is None


def test_nothing_is_drawn_of_fewer_than_two_finished_trials():
    trials = [trial for trial in grid_trials() if trial.number in {DIVERGED, *STOPPED, 4}]
    for plot in (heat_map, parallel_coordinates, pareto, importances):
        assert plot(GRID.tune, trials) is None
        assert plot(GRID.tune, []) is None
    assert learning_curves(GRID.tune, []) is None


def test_what_is_not_finite_is_not_drawn():
    trials = grid_trials()
    trials[4].measured["accuracy"]["value"] = math.nan
    texts = [text.get_text() for text in drawn_by(heat_map(GRID.tune, trials)).axes[0].texts]
    assert "★ 0.730" in texts and not any("nan" in text for text in texts)
    lines = drawn_by(parallel_coordinates(GRID.tune, trials)).axes[0].lines
    assert "_trial 4" not in {line.get_label() for line in lines}


def test_dollars_in_a_value_are_dollars():
    config = config_of({"space": {"model.lora.target_modules": ["$a$b$", "x$"], "train.epochs": [1, 2]}})
    assert config.tune is not None
    trials = [trial_of(i, point, 0.6 + i / 100) for i, point in enumerate(points(config.tune.searched()))]
    axes = drawn_by(parallel_coordinates(config.tune, trials)).axes[0]
    assert {"\\$a\\$b\\$", "x\\$"} <= {text.get_text() for text in axes.texts}


def test_options_of_one_type_are_named_by_what_tells_them_apart():
    options = [
        {"type": "sigmoid", "beta": {"choice": [0.1, 0.2]}},
        {"type": "sigmoid", "beta": {"choice": [0.3, 0.4]}},
        {"type": "sigmoid", "label_smoothing": 0.1},
    ]
    config = config_of({"space": {"train.loss": options}})
    assert config.tune is not None
    trials = [trial_of(i, point, 0.6 + i / 100) for i, point in enumerate(points(config.tune.searched()))]
    axes = drawn_by(parallel_coordinates(config.tune, trials)).axes[0]
    labels = [text.get_text() for text in axes.texts if round(text.get_position()[0]) == 0]
    assert labels == ["1: sigmoid, beta …", "2: sigmoid, beta …", "sigmoid, label_smoothing …"]


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
