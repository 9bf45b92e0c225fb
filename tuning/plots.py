"""Plots of a sweep, each a figure of its own, or None where it would mean nothing.

Objectives are drawn in their own direction and unit, as `measured` has them, and brighter is better everywhere. A trial
that did not finish has no colour: what it measured, it measured after fewer steps.
"""

from __future__ import annotations

import json
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from dpo_ray.config import Tune
from dpo_ray.config.tune import Choice, Distribution, Measure, Range
from tuning.measures import UNITS, Measured, higher_is_better, pareto_front, score
from tuning.records import Trial
from tuning.space import labels
from tuning.suggestions import study_of

_Z = 1.96  # of a 95% interval

# Okabe and Ito's colours, which people of every colour vision tell apart.
_BEST, _FINISHED, _DIVERGED, _GREY, _FAINT = "#0072b2", "#56b4e9", "#d55e00", "#8c8c8c", "#e6e6e6"
_STAR = "★"

_MOST_LABEL = 26  # characters of an option's label
_LOG_FROM = 20.0  # values that span more than this factor are drawn by their logarithm
_FEWEST_FOR_IMPORTANCES = 4


@dataclass(frozen=True)
class ShownObjective:
    """An objective as people read it: one measure in its own direction and unit, or the weighted sum of several.

    `tuning.measures.score` turns the sign of a measure that is better when smaller; this does not.
    """

    weights: Mapping[Measure, float]

    @property
    def name(self) -> str:
        if len(self.weights) == 1:
            return next(iter(self.weights)).replace("_", " ")
        name = ""
        for measure, weight in self.weights.items():
            factor = "" if weight == 1 else f"{weight:g}·"
            name += f"{' + ' if higher_is_better(measure) else ' − '}{factor}{measure.replace('_', ' ')}"
        return name.removeprefix(" + ").lstrip()

    @property
    def unit(self) -> str:
        return UNITS[next(iter(self.weights))] if len(self.weights) == 1 else "weighted sum"

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"held-out {self.name} ({self.unit})"

    @property
    def higher_is_better(self) -> bool:
        return len(self.weights) > 1 or higher_is_better(next(iter(self.weights)))

    def of(self, found: Measured) -> dict[str, float] | None:
        """Value, standard error (se) and ends of the 95% interval (low, high); None where a measure is missing or is
        not finite."""
        scored = score(self.weights, found)
        if scored is None or not all(math.isfinite(number) for number in scored):
            return None
        if len(self.weights) == 1:
            return found[next(iter(self.weights))]
        value, error = scored
        return {"value": value, "se": error, "low": value - _Z * error, "high": value + _Z * error}

    def of_score(self, scored: tuple[float, float]) -> tuple[float, float]:
        """Value and standard error of a score of this objective, in its own direction and unit."""
        if len(self.weights) > 1:
            return scored
        factor = next(iter(self.weights.values())) * (1 if self.higher_is_better else -1)
        return scored[0] / factor, scored[1] / abs(factor)


def shown_objectives(tune: Tune) -> tuple[ShownObjective, ...]:
    """Those of the sweep, the first one being what chooses."""
    return tuple(ShownObjective(weights) for weights in tune.objectives())


def rounded(value: float, error: float) -> str:
    """A value with as many decimals as its error leaves a meaning to: two digits of the error."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return f"{value:.3g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(error)))}f}"


def shown(value: Any) -> str:
    """A searched value, for people."""
    if isinstance(value, float):
        mantissa, exponent, power = (f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}").partition("e")
        return f"{float(mantissa):g}e{int(power)}" if exponent else mantissa
    return value if isinstance(value, str) else json.dumps(value)


def heat_map(tune: Tune, trials: Sequence[Trial], best: int | None = None) -> Figure | None:
    """The first objective over β and the learning rate, or over the two numbers that matter most where these two are
    not both searched. Listed values make a grid with the values written in, ranges a scatter.

    Losses get a panel each where β belongs to the loss, for it is not the same quantity in all of them.

    Args:
        trials: the search's own, not those that repeat one.
        best: number of the trial to be marked; left out: the one with the best value.

    None with fewer than two finished trials, or where fewer than two numbers are searched.
    """
    pair = _pair(tune, trials)
    if pair is None:
        return None
    placed = [trial for trial in trials if _searched_values(tune, trial).keys() >= set(pair)]
    finished = _finished(tune, placed)
    if len(finished) < 2:
        return None
    panels = _panels(tune, placed, pair)
    is_grid = _is_grid(tune, pair)
    heights = _distinct(tune, placed, pair[1])
    if is_grid:
        cells = max(len(_distinct(tune, members, pair[0])) for members in panels.values())
        columns = min(len(panels), max(1, _MOST_CELLS // cells))
        width, height = 1.1 + 0.85 * cells, 0.8 + 0.55 * len(heights)
    else:
        columns = min(len(panels), 3)
        width, height = 4.2, 3.6
    rows = math.ceil(len(panels) / columns)
    size = (max(6.5, min(12.0, 1.6 + width * columns)), max(3.6, min(16.0, 0.9 + height * rows)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    colours = _Colours(tune, finished)
    marked = _best(tune, finished) if best is None else best
    for axes, (title, members) in zip(grid.flat, panels.items(), strict=False):
        if is_grid:
            _draw_cells(tune, axes, members, pair, heights, colours, marked, cell=size[0] * 0.85 / columns / cells)
        else:
            _draw_points(tune, axes, members, pair, colours, marked)
            across = [_searched_values(tune, trial)[pair[0]] for trial in members]
            if _is_log(tune, pair[0], across):
                _set_log_scale(axes, "x", across)
            if _is_log(tune, pair[1], heights):
                _set_log_scale(axes, "y", heights)
        axes.set_title(_text(title), fontsize="medium")
        axes.set_xlabel(_text(pair[0]))
    for axes in grid[:, 0]:
        axes.set_ylabel(_text(pair[1]))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    colours.add_bar(figure, list(grid.flat))
    figure.suptitle(f"Where the best trials lie: brighter is better, {_STAR} marks the best")
    if not is_grid:
        _add_legend(figure, placed, _ENDED_POINTS)
    return figure


def parallel_coordinates(tune: Tune, trials: Sequence[Trial], best: int | None = None) -> Figure | None:
    """A line a trial through its searched values to its objective, which is better further up.

    Trials that did not finish end before the objective's axis. None with fewer than two finished trials.

    Args:
        trials, best: see heat_map.
    """
    finished = _finished(tune, trials)
    if len(finished) < 2:
        return None
    ended = [trial for trial in trials if trial.state in _ENDED_LINES]
    drawn_ones = [*ended, *sorted(finished, key=lambda trial: _oriented(tune, trial))]  # the best ones on top
    values = {trial.number: _searched_values(tune, trial) for trial in drawn_ones}
    paths = [p for p in _searched_paths(tune) if any(p in mine for mine in values.values())]
    scales = [_Scale.of(tune, path, [mine[path] for mine in values.values() if path in mine]) for path in paths]
    objective = shown_objectives(tune)[0]
    last = _Scale.of_numbers([_value(tune, trial) for trial in finished], is_log=False, few=0)
    last = last if objective.higher_is_better else last.turned()
    marked = _best(tune, finished) if best is None else best
    lacking = [any(path not in mine for mine in values.values()) for path in paths]

    figure = Figure(figsize=(max(7.5, min(13.0, 1.9 * (len(paths) + 1))), 4.8), layout="constrained")
    axes = figure.subplots()
    colours = _Colours(tune, finished)
    across = [
        _spread([scale.position(values[t.number][path]) if path in values[t.number] else _LACKING for t in drawn_ones])
        for path, scale in zip(paths, scales, strict=True)
    ]
    style: dict[str, Any]
    for trial, *heights in zip(drawn_ones, *across, strict=True):
        if trial.state == "finished":
            heights.append(last.position(_value(tune, trial)))
            is_best = trial.number == marked
            style = {"color": colours.of(trial), "linewidth": 3.5 if is_best else 1.3, "zorder": 3 if is_best else 2}
        else:
            style = _ENDED_LINES[trial.state]
        axes.plot(range(len(heights)), heights, label=_line_label(trial), **style)
    for x, (scale, lacks) in enumerate(zip([*scales, last], [*lacking, False], strict=True)):
        _draw_axis(axes, x, scale, lacking=lacks)
    axes.set_xlim(-0.75, len(paths) + 0.35)
    axes.set_ylim((_LACKING if any(lacking) else 0.0) - 0.06, 1.06)
    axes.set_xticks(range(len(paths) + 1), [*map(_broken, paths), _label_lines(objective, 20)])
    axes.tick_params(axis="x", length=0, labeltop=True, labelbottom=False, labelsize="small")
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    colours.add_bar(figure, [axes])
    figure.suptitle("Which values the best trials share: follow the bright lines, the best one is thick")
    _add_legend(figure, ended, _ENDED_LINES)
    return figure


def learning_curves(tune: Tune, trials: Sequence[Trial], best: int | None = None) -> Figure | None:
    """The first objective at each evaluation against the optimizer step, a line a trial; of the best one also the 95%
    intervals.

    A trial that diverged before its first evaluation is a cross on the lower edge, at the step that it came to. None
    where fewer than two trials were measured, or none twice.

    Args:
        trials, best: see heat_map.
    """
    objective = shown_objectives(tune)[0]
    curves = {trial.number: _curve(objective, trial) for trial in trials}
    measured = [trial for trial in trials if curves[trial.number]]
    if len(measured) < 2 or all(len(curve) < 2 for curve in curves.values()):
        return None
    finished = _finished(tune, trials)
    marked = best if best is not None or not finished else _best(tune, finished)
    figure = Figure(figsize=(8.0, 4.4), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, Line2D] = {}
    for trial in measured:
        curve = curves[trial.number]
        steps = [step for step, _ in curve]
        kind = "best" if trial.number == marked else trial.state
        style = _CURVES[kind]
        axes.plot(steps, [one["value"] for _, one in curve], label=_line_label(trial), markevery=[-1], **style)
        kinds[kind] = Line2D([], [], **style)
        if kind == "best":
            low, high = ([one[end] for _, one in curve] for end in ("low", "high"))
            axes.fill_between(steps, low, high, color=_BEST, alpha=0.15, linewidth=0)
    at_once = [trial for trial in trials if trial.state == "diverged" and not curves[trial.number]]
    if at_once:
        xs = [trial.step for trial in at_once]
        edge = axes.get_xaxis_transform()  # x in steps, y in the axes' height
        axes.plot(xs, [0.0] * len(xs), linestyle="", marker="x", color=_DIVERGED, transform=edge, clip_on=False)
        kinds.setdefault("diverged", Line2D([], [], **_CURVES["diverged"]))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(_label_lines(objective, 48))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("How trials went on: the best one thick, with its 95% intervals")
    counts = {kind: sum(1 for t in trials if _kind(t, marked) == kind) for kind in kinds}
    names = {"best": f"trial {marked}, the best"} | {k: f"{k} ({n})" for k, n in counts.items() if k != "best"}
    order = [kind for kind in _CURVES if kind in kinds]
    figure.legend([kinds[k] for k in order], [names[k] for k in order], loc="outside lower center", ncols=len(order))
    return figure


def importances(tune: Tune, trials: Sequence[Trial]) -> Figure | None:
    """How much each searched value decided whether a finished trial was among the best by the first objective, by
    Optuna's PED-ANOVA (arXiv:2304.10255), of which the shares add up to 1.

    None with fewer than four finished trials, or where they do not differ in what was searched or measured.
    """
    found = _importances(tune, trials)
    if found is None:
        return None
    names = list(found)
    figure = Figure(figsize=(8.0, 1.3 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([_text(_without_middle(name)) for name in names], list(found.values()), color=_BEST, height=0.65)
    axes.bar_label(bars, [f"{share:.0%}" for share in found.values()], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(found.values()))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("share of the importance (PED-ANOVA)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Which values decide: longer bars are worth searching more closely")
    return figure


def pareto(tune: Tune, trials: Sequence[Trial], best: int | None = None) -> Figure | None:
    """The first two objectives of all finished trials, those of the Pareto front joined; bars are one standard error.

    The front is that of the two objectives that are drawn. None with one objective, or with fewer than two finished
    trials that have both measured.

    Args:
        trials, best: see heat_map.
    """
    objectives = shown_objectives(tune)[:2]
    if len(objectives) < 2:
        return None
    both = [(t, [o.of(t.measured) for o in objectives]) for t in trials if t.state == "finished"]
    points = {t.number: [one for one in mine if one is not None] for t, mine in both if None not in mine}
    if len(points) < 2:
        return None
    numbers = list(points)
    x, y = (np.array([points[n][axis]["value"] for n in numbers]) for axis in (0, 1))
    x_error, y_error = (np.array([points[n][axis]["se"] for n in numbers]) for axis in (0, 1))
    signs = [1 if objective.higher_is_better else -1 for objective in objectives]
    front = pareto_front([(signs[0] * a, signs[1] * b) for a, b in zip(x, y, strict=True)])
    front = sorted(front, key=lambda i: float(x[i]))
    marked = _best(tune, _finished(tune, trials)) if best is None else best

    figure = Figure(figsize=(7.0, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="none", ecolor="#c4c4c4", elinewidth=0.8, zorder=1)
    axes.scatter(x, y, s=22, color=_GREY, zorder=2, label="finished")
    # Between two trials of the front what both of them reach is known, and no more: steps, no straight lines.
    steps = "steps-pre" if objectives[0].higher_is_better else "steps-post"
    axes.plot(x[front], y[front], drawstyle=steps, color=_BEST, linewidth=1.2, zorder=2)
    axes.scatter(x[front], y[front], s=38, color=_BEST, zorder=3, label="on the Pareto front")
    for i in front:
        axes.annotate(str(numbers[i]), (x[i], y[i]), xytext=(5, 5), textcoords="offset points", fontsize="small")
    if marked in points:
        i = numbers.index(marked)
        axes.scatter(x[[i]], y[[i]], s=190, zorder=4, facecolor=_BEST, **_MARK, label=f"trial {marked}, the best")
    axes.set_xlabel(f"{objectives[0].label}, {_better(objectives[0])}")
    axes.set_ylabel(_label_lines(objectives[1], 48))
    axes.spines[["top", "right"]].set_visible(False)
    corner = f"{'upper' if signs[1] > 0 else 'lower'} {'right' if signs[0] > 0 else 'left'}"
    axes.set_title(f"What one objective costs in the other: better is {corner}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


# What is searched, by the path in the configuration


def _searched(tune: Tune) -> Iterator[tuple[str, str, Distribution]]:
    """Name in a point, path in the configuration, and distribution: one path has several names where several options
    of a choice have it. What is inside of an option comes after it."""
    for path, found in tune.searched().items():
        yield from _inside(path, path, found)


def _inside(name: str, path: str, found: Any) -> Iterator[tuple[str, str, Distribution]]:
    if isinstance(found, Range):
        yield name, path, found
    elif isinstance(found, Choice):
        yield name, path, found
        for label, option in zip(labels(found), found.options, strict=True):
            yield from _inside(f"{name}[{label}]", path, option)
    elif isinstance(found, Mapping):
        for key, inner in found.items():
            yield from _inside(f"{name}.{key}", f"{path}.{key}", inner)


def _searched_paths(tune: Tune) -> list[str]:
    return list(dict.fromkeys(path for _, path, _ in _searched(tune)))


def _searched_values(tune: Tune, trial: Trial) -> dict[str, Any]:
    """Path → value; of an option that is a section its label."""
    values = {}
    for name, path, found in _searched(tune):
        if name in trial.point:
            value = trial.point[name]
            values[path] = _option(found, value) if isinstance(found, Choice) else value
    return values


def _option(choice: Choice, label: str) -> Any:
    """What a label stands for, or the name of a section."""
    option = choice.options[labels(choice).index(label)]
    if not isinstance(option, Mapping | Range | Choice):
        return option
    names = [_section_name(*both) for both in zip(labels(choice), choice.options, strict=True)]
    place = labels(choice).index(label)
    return names[place] if names.count(names[place]) == 1 else f"{place + 1}: {names[place]}"


def _section_name(label: str, option: Any) -> str:
    """Shorter than its label, which is all of it as JSON where its type does not tell it apart."""
    if not isinstance(option, Mapping) or label == option.get("type"):
        return label
    parts = []
    for key, inner in option.items():
        value = "…" if isinstance(inner, Mapping | Range | Choice) else shown(inner)
        parts.append(value if key == "type" else f"{key} {value}")
    return ", ".join(parts) or label


def _distinct(tune: Tune, trials: Iterable[Trial], path: str) -> list[Any]:
    values = (_searched_values(tune, trial) for trial in trials)
    return sorted({mine[path] for mine in values if path in mine})


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _pair(tune: Tune, trials: Sequence[Trial]) -> tuple[str, str] | None:
    """The two paths of the heat map, across and up."""
    found: dict[str, list[Any]] = {}
    for trial in trials:
        for path, value in _searched_values(tune, trial).items():
            found.setdefault(path, []).append(value)
    numbers = [p for p in _searched_paths(tune) if _are_numbers(found.get(p, ())) and len(set(found.get(p, ()))) > 1]
    beta = next((path for path in numbers if path.startswith("train.loss.") and path.endswith(".beta")), None)
    if beta is not None and "train.learning_rate" in numbers:
        return beta, "train.learning_rate"
    if len(numbers) < 2:
        return None
    shares = dict.fromkeys(numbers, 0.0)
    path_of = {name: path for name, path, _ in _searched(tune)}
    for name, share in (_importances(tune, trials) or {}).items():
        if path_of[name] in shares:
            shares[path_of[name]] += share
    first, second = sorted(numbers, key=lambda path: -shares[path])[:2]
    return first, second


def _panels(tune: Tune, trials: Sequence[Trial], pair: tuple[str, str]) -> dict[str, list[Trial]]:
    """Title → trials, one panel for each loss where the pair has an option of it."""
    if not any(path.startswith("train.loss.") for path in pair):
        return {"": list(trials)}
    panels: dict[str, list[Trial]] = {}
    for trial in trials:
        mine = _searched_values(tune, trial)
        loss = mine.get("train.loss", mine.get("train.loss.type"))
        panels.setdefault("" if loss is None else _cut(str(loss)), []).append(trial)
    return panels


def _ranges(tune: Tune, path: str) -> list[Range]:
    return [found for _, mine, found in _searched(tune) if mine == path and isinstance(found, Range)]


def _is_grid(tune: Tune, pair: tuple[str, str]) -> bool:
    return tune.search == "grid" or not any(_ranges(tune, path) for path in pair)


def _is_log(tune: Tune, path: str, values: Sequence[float]) -> bool:
    if any(found.kind == "loguniform" for found in _ranges(tune, path)):
        return True
    return min(values) > 0 and max(values) / min(values) > _LOG_FROM


# What was measured


def _value(tune: Tune, trial: Trial) -> float:
    one = shown_objectives(tune)[0].of(trial.measured)
    assert one is not None  # of a trial that _finished has let through
    return one["value"]


def _oriented(tune: Tune, trial: Trial) -> float:
    return _value(tune, trial) * (1 if shown_objectives(tune)[0].higher_is_better else -1)


def _finished(tune: Tune, trials: Iterable[Trial]) -> list[Trial]:
    objective = shown_objectives(tune)[0]
    return [t for t in trials if t.state == "finished" and objective.of(t.measured) is not None]


def _best(tune: Tune, finished: Sequence[Trial]) -> int | None:
    return max(finished, key=lambda trial: _oriented(tune, trial)).number if finished else None


def _curve(objective: ShownObjective, trial: Trial) -> list[tuple[int, dict[str, float]]]:
    """Step and what was measured after it, at each evaluation that has measured the objective."""
    found = ((e["step"], objective.of(e["measured"])) for e in trial.evaluations)
    return [(step, one) for step, one in found if one is not None]


def _importances(tune: Tune, trials: Sequence[Trial]) -> dict[str, float] | None:
    """Name in points → its share, the largest first; None where they would mean nothing.

    For a study whose parameters it is left to find Optuna documents no error, so none is caught here: it warns where
    few trials leave an importance inaccurate, and it gives zeros where the trials do not differ.
    """
    finished = _finished(tune, trials)
    if len(finished) < _FEWEST_FOR_IMPORTANCES:
        return None
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    objectives = tune.objectives()
    study = study_of(tune, [t for t in finished if all(score(o, t.measured) for o in objectives)])
    # What sets the best tenth apart. Optuna advises five trials among them at least; of few trials they are a third.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(1 / 3, max(0.1, 5 / len(finished))))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of few trials, which the page says; that low values count as good: hence the −
        found = get_param_importances(study, evaluator=evaluator, target=lambda t: -t.values[0], normalize=False)
    total = sum(found.values())
    if not total > 0:
        return None
    return {name: found[name] / total for name in sorted(found, key=lambda name: (-found[name], name))}


# How it is drawn

_MARK: dict[str, Any] = {"marker": "*", "edgecolor": "black", "linewidth": 1.2}

_ENDED_LINES: dict[str, dict[str, Any]] = {
    "stopped": {"color": _GREY, "linewidth": 0.6, "alpha": 0.8},
    "failed": {"color": _GREY, "linewidth": 0.6, "alpha": 0.8, "linestyle": ":"},
    "diverged": {"color": _DIVERGED, "linewidth": 0.9, "linestyle": "--"},
}

_CURVES: dict[str, dict[str, Any]] = {
    "best": {"color": _BEST, "linewidth": 3.0, "zorder": 4, "marker": "o", "markersize": 6},
    "finished": {"color": _FINISHED, "linewidth": 1.1, "alpha": 0.8, "zorder": 3, "marker": "o", "markersize": 3},
    "stopped": {"color": _GREY, "linewidth": 0.9, "zorder": 2, "marker": "s", "markersize": 4},
    "diverged": {"color": _DIVERGED, "linewidth": 1.1, "linestyle": "--", "marker": "x", "zorder": 2},
    "failed": {"color": _GREY, "linewidth": 0.9, "linestyle": ":", "marker": "d", "markersize": 4},
    "training": {"color": _GREY, "linewidth": 0.9, "zorder": 2},
    "waiting": {"color": _GREY, "linewidth": 0.9, "zorder": 2},
}


_ENDED_POINTS: dict[str, dict[str, Any]] = {
    "stopped": {"linestyle": "", "marker": "o", "markeredgecolor": _GREY, "markerfacecolor": "none"},
    "failed": {"linestyle": "", "marker": "+", "markeredgecolor": _GREY},
    "diverged": {"linestyle": "", "marker": "x", "markeredgecolor": _DIVERGED},
}

_MOST_CELLS = 12  # that stand side by side in panels
_MOST_SPREAD = 0.04  # of the height of an axis
_FEW = 6  # values that each have a tick of their own
_LACKING = -0.14  # height of the line of a trial that has no value on an axis, which goes from 0 to 1


class _Colours:
    """Of the first objective's values, brighter being better."""

    def __init__(self, tune: Tune, finished: Sequence[Trial]) -> None:
        self._tune = tune
        self.objective = shown_objectives(tune)[0]
        values = [_value(tune, trial) for trial in finished]
        self.map: Colormap = matplotlib.colormaps["viridis" if self.objective.higher_is_better else "viridis_r"]
        self.norm = Normalize(min(values), max(values))

    def at(self, value: float) -> tuple[float, float, float, float]:
        found: tuple[float, float, float, float] = self.map(float(self.norm(value)))
        return found

    def of(self, trial: Trial) -> tuple[float, float, float, float]:
        return self.at(_value(self._tune, trial))

    def add_bar(self, figure: Figure, axes: list[Axes]) -> None:
        bar = figure.colorbar(ScalarMappable(self.norm, self.map), ax=axes, pad=0.02)
        bar.set_label(_label_lines(self.objective, 48))


def _draw_cells(
    tune: Tune,
    axes: Axes,
    trials: Sequence[Trial],
    pair: tuple[str, str],
    rows: list[Any],
    colours: _Colours,
    marked: int | None,
    *,
    cell: float,
) -> None:
    """A cell for each combination. Where several trials share one, it shows the best of them.

    Args:
        cell: width of a cell in inches, which what is written in it has to fit.
    """
    columns = _distinct(tune, trials, pair[0])
    cells: dict[tuple[int, int], list[Trial]] = {}
    for trial in trials:
        mine = _searched_values(tune, trial)
        cells.setdefault((rows.index(mine[pair[1]]), columns.index(mine[pair[0]])), []).append(trial)
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), members in cells.items():
        finished = _finished(tune, members)
        if finished:
            top = max(finished, key=lambda trial: _oriented(tune, trial))
            one = colours.objective.of(top.measured)
            assert one is not None
            values[row, column] = one["value"]
            text, ink, size = rounded(one["value"], one["se"]), _ink(colours.at(one["value"])), min(10.0, 14 * cell)
        else:
            (text, ink), size = _ended_text(members), min(8.5, 11 * cell)
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=_FAINT, edgecolor="white", zorder=0))
        if any(trial.number == marked for trial in members):
            axes.add_patch(Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, fill=False, edgecolor=ink, linewidth=2))
            text = f"{_STAR} {text}"
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=size)
    edges = np.arange(len(columns) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
    axes.pcolormesh(*edges, values, cmap=colours.map, norm=colours.norm, edgecolors="white", linewidth=1.5, zorder=0)
    axes.set_xticks(range(len(columns)), [shown(float(value)) for value in columns])
    axes.set_yticks(range(len(rows)), [shown(float(value)) for value in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_points(
    tune: Tune, axes: Axes, trials: Sequence[Trial], pair: tuple[str, str], colours: _Colours, marked: int | None
) -> None:
    values = {trial.number: _searched_values(tune, trial) for trial in trials}
    placed = {number: (float(mine[pair[0]]), float(mine[pair[1]])) for number, mine in values.items()}
    for state, style in _ENDED_POINTS.items():
        ended = [placed[trial.number] for trial in trials if trial.state == state]
        if ended:
            axes.plot(*zip(*ended, strict=True), label=f"_{state}", **style)
    finished = sorted(_finished(tune, trials), key=lambda trial: _oriented(tune, trial))
    if finished:
        x, y = zip(*(placed[trial.number] for trial in finished), strict=True)
        axes.scatter(x, y, s=46, c=[_value(tune, t) for t in finished], cmap=colours.map, norm=colours.norm,
                     edgecolors="#444444", linewidths=0.5, zorder=2, label="_finished")  # fmt: skip
    if any(trial.number == marked for trial in trials) and marked is not None:
        colour = next((colours.of(trial) for trial in finished if trial.number == marked), "white")
        axes.scatter(*placed[marked], s=260, zorder=3, facecolor=colour, **_MARK, label="_best")


def _set_log_scale(axes: Axes, axis: Literal["x", "y"], values: Sequence[float]) -> None:
    decades = math.log10(max(values) / min(values))
    if axis == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    mine = axes.xaxis if axis == "x" else axes.yaxis
    # Within two decades the powers of ten alone would label one tick or two.
    mine.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,)))
    mine.set_major_formatter(lambda value, _: shown(float(value)))
    mine.set_minor_formatter(NullFormatter())  # these labels would overlap


@dataclass(frozen=True)
class _Scale:
    """An axis of the parallel coordinates, from 0 to 1."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[tuple[float, str], ...]
    """Position and label."""
    options: tuple[Any, ...] | None = None
    """Of a choice whose values are no numbers, in their order."""
    is_turned: bool = False

    @classmethod
    def of(cls, tune: Tune, path: str, values: Sequence[Any]) -> _Scale:
        if _are_numbers(values):
            return cls.of_numbers([float(value) for value in values], is_log=_is_log(tune, path, values))
        choices = [found for _, mine, found in _searched(tune) if mine == path and isinstance(found, Choice)]
        known = [_option(choice, label) for choice in choices for label in labels(choice)]
        # Lists are no keys, so options are told apart as their JSON.
        options = tuple({json.dumps(o): o for o in known if o in values}.values())
        heights = np.linspace(0, 1, len(options)) if len(options) > 1 else np.array([0.5])
        ticks = tuple((float(y), _cut(shown(o))) for y, o in zip(heights, options, strict=True))
        return cls(0.0, 1.0, False, ticks, options)

    @classmethod
    def of_numbers(cls, values: Sequence[float], *, is_log: bool, few: int = _FEW) -> _Scale:
        bare = cls(min(values), max(values), is_log, ())
        ticks: list[tuple[float, str]] = []
        for value in _tick_values(values, is_log, few):
            position = bare.position(value)
            if not ticks or position - ticks[-1][0] > 0.055:  # nearer labels would overlap
                ticks.append((position, shown(value)))
        return cls(bare.low, bare.high, is_log, tuple(ticks))

    def turned(self) -> _Scale:
        """The same, its largest value below."""
        ticks = tuple((1 - position, label) for position, label in self.ticks)
        return _Scale(self.low, self.high, self.is_log, ticks, self.options, not self.is_turned)

    def position(self, value: Any) -> float:
        if self.options is not None:
            return self.ticks[self.options.index(value)][0]
        low, high, mine = (math.log(x) if self.is_log else x for x in (self.low, self.high, float(value)))
        height = (mine - low) / (high - low) if high > low else 0.5
        return 1 - height if self.is_turned else height


def _tick_values(values: Sequence[float], is_log: bool, few: int) -> list[float]:
    """The values themselves, where they are few, and otherwise round numbers between the smallest and the largest."""
    distinct = sorted(set(values))
    low, high = distinct[0], distinct[-1]
    if len(distinct) <= max(1, few):
        return distinct
    locator = LogLocator(subs=(1.0, 2.0, 5.0), numticks=99) if is_log else MaxNLocator(6)
    found = [float(x) for x in locator.tick_values(low, high) if low <= x <= high]
    if is_log and len(found) > 8:
        found = [x for x in found if math.isclose(math.log10(x), round(math.log10(x)))]
    return found if len(found) > 1 else [low, high]


def _spread(heights: Sequence[float]) -> list[float]:
    """Heights of lines, those of the same value set apart a little, in the order that they are drawn in, so that each
    can be followed."""
    members: dict[float, list[int]] = {}
    for i, height in enumerate(heights):
        members.setdefault(height, []).append(i)
    found = list(heights)
    for height, same in members.items():
        half = min(_MOST_SPREAD, 0.006 * (len(same) - 1))
        for i, offset in zip(same, np.linspace(-half, half, len(same)), strict=True):
            found[i] = height + (float(offset) if len(same) > 1 else 0.0)
    return found


def _draw_axis(axes: Axes, x: int, scale: _Scale, *, lacking: bool) -> None:
    halo = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    axes.plot([x, x], [0, 1], color="black", linewidth=0.9, zorder=4, label="_axis")
    for position, label in [*scale.ticks, *([(_LACKING, "–")] if lacking else [])]:
        axes.plot([x - 0.02, x + 0.02], [position] * 2, color="black", linewidth=0.9, zorder=4, label="_tick")
        axes.text(x - 0.05, position, _text(label), ha="right", va="center", fontsize="small", zorder=5, bbox=halo)


def _line_label(trial: Trial) -> str:
    return f"_trial {trial.number}"  # the underscore keeps it out of legends


def _kind(trial: Trial, marked: int | None) -> str:
    return "best" if trial.number == marked else trial.state


def _ended_text(trials: Sequence[Trial]) -> tuple[str, str]:
    """Of a cell in which nothing finished, and its colour."""
    states = {trial.state for trial in trials}
    if "stopped" in states:
        return f"stopped\nat step {max(trial.step for trial in trials if trial.state == 'stopped')}", "#555555"
    if "diverged" in states:
        return "diverged", "#a04400"
    return next(iter(states)), "#555555"


def _ink(colour: tuple[float, float, float, float]) -> str:
    luminance = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]
    return "black" if luminance > 0.45 else "white"


def _add_legend(figure: Figure, trials: Sequence[Trial], styles: Mapping[str, dict[str, Any]]) -> None:
    """Of the states that there are beside finished."""
    counts = {state: sum(1 for trial in trials if trial.state == state) for state in styles}
    kept = [state for state in styles if counts[state]]
    if kept:
        handles = [Line2D([], [], **styles[state]) for state in kept]
        names = [f"{state} ({counts[state]})" for state in kept]
        figure.legend(handles, names, loc="outside lower center", ncols=len(kept))


def _better(objective: ShownObjective) -> str:
    return "higher is better" if objective.higher_is_better else "lower is better"


def _broken(path: str) -> str:
    """A path in two lines, its last word alone."""
    parents, dot, leaf = path.rpartition(".")
    return _text(f"{parents}{dot}\n{leaf}" if parents else leaf)


def _label_lines(objective: ShownObjective, width: int) -> str:
    """An objective's label and direction in lines of at most so many characters."""
    return "\n".join([*textwrap.wrap(objective.label, width), _better(objective)])


def _cut(label: str, most: int = _MOST_LABEL) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"


def _without_middle(name: str) -> str:
    """Of a name in points, whose last word says the most."""
    return name if len(name) <= 56 else f"{name[:34]}…{name[-20:]}"


def _text(label: str) -> str:
    """Matplotlib would take what stands between two dollars for a formula."""
    return label.replace("$", "\\$")
