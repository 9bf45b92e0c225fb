"""Which values the best trials share: a line a trial through its searched values to its objective."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ray.config import Tune
from dpo_ray.config.tune import Choice
from dpo_ray.report.document import Chart, Table
from dpo_ray.report.vega import GROUND, INK, SOFT
from tuning.heat_map import colours
from tuning.objectives import better, shown, shown_objectives
from tuning.records import Trial
from tuning.searched import (
    are_numbers,
    best_of,
    cut,
    finished,
    is_log,
    option_of,
    oriented,
    searched,
    searched_paths,
    searched_values,
    value_of,
)
from tuning.space import labels

LACKING = -0.14  # height of a trial that has no value on an axis, which goes from 0 to 1
_LEAF = "peek(split(datum.label, '.'))"
"""Of a path its last word, for an axis is narrow."""
_FEW = 6  # values that each have a tick of their own
_APART = 0.055  # of the height of an axis: nearer labels would overlap


def parallel_coordinates(tune: Tune, trials: Sequence[Trial], best: int | None = None) -> Chart | None:
    """The better a trial, the further up and the brighter it ends; those that did not finish end before the last axis.

    None with fewer than two finished trials.

    Args:
        trials, best: as of tuning.heat_map.heat_maps.
    """
    done = finished(tune, trials)
    if len(done) < 2:
        return None
    objective = shown_objectives(tune)[0]
    ended = [trial for trial in trials if trial.state in {"stopped", "failed", "diverged"}]
    drawn_ones = [*ended, *sorted(done, key=lambda trial: oriented(tune, trial))]  # the best ones on top
    mine = {trial.number: searched_values(tune, trial) for trial in drawn_ones}
    paths = [p for p in searched_paths(tune) if any(p in values for values in mine.values())]
    scales = [_Scale.of(tune, path, [values[path] for values in mine.values() if path in values]) for path in paths]
    last = _Scale.of_numbers([value_of(tune, trial) for trial in done], is_log=False, few=0)
    last = last if objective.higher_is_better else last.turned()
    axes = [*paths, objective.name]
    marked = best_of(tune, done) if best is None else best
    points = []
    for order, trial in enumerate(drawn_ones):
        values = mine[trial.number]
        is_best = trial.number == marked
        common: dict[str, Any] = {"trial": trial.number, "state": trial.state, "order": order, "best": is_best}
        if trial.state == "finished":
            common["value"] = value_of(tune, trial)
        for path, scale in zip(paths, scales, strict=True):
            at = (
                {"at": scale.position(values[path]), "is": shown(values[path])}
                if path in values
                else {"at": LACKING, "is": "–"}
            )
            points.append({**common, "axis": path, "place": paths.index(path), **at})
        if trial.state == "finished":
            points.append(
                {
                    **common,
                    "axis": axes[-1],
                    "place": len(paths),
                    "at": last.position(common["value"]),
                    "is": shown(common["value"]),
                }
            )
    lacking = {path for path in paths if any(path not in values for values in mine.values())}
    ticks = [
        {"axis": name, "at": at, "is": label}
        for name, scale in zip(axes, [*scales, last], strict=True)
        for at, label in [*scale.ticks, *([(LACKING, "–")] if name in lacking else [])]
    ]
    spec = _spec(points, ticks, axes, colours(objective, min(_shades(points)), max(_shades(points))))
    rows = [
        [str(t.number), t.state, *(shown(mine[t.number][p]) if p in mine[t.number] else "–" for p in paths),
         shown(value_of(tune, t)) if t.state == "finished" else "–"]
        for t in reversed(drawn_ones)
    ]  # fmt: skip
    says = (
        "Each line is a trial and crosses each axis at its value (at – where its options have none there); the best "
        "one is thick. Where the bright lines meet the value matters, and where they spread over the whole axis it "
        f"decides little. Grey lines did not finish. Up is better on the last axis ({better(objective)})."
    )
    return Chart("Which values the best trials share", says, spec, Table(["trial", "state", *axes], rows))


def _shades(points: Sequence[dict[str, Any]]) -> list[float]:
    return [point["value"] for point in points if "value" in point]


def _spec(points: list[Any], ticks: list[Any], axes: list[str], colour: dict[str, Any]) -> dict[str, Any]:
    x = {
        "field": "axis",
        "type": "nominal",
        "sort": axes,
        "title": None,
        "axis": {
            "labelAngle": 0,
            "orient": "top",
            "domain": False,
            "ticks": False,
            "grid": True,
            "labelExpr": _LEAF,
            "labelColor": INK,
        },
    }
    y = {
        "field": "at",
        "type": "quantitative",
        "axis": None,
        "scale": {"domain": [LACKING - 0.05, 1.05], "nice": False},
    }
    tooltip = [
        {"field": "trial"},
        {"field": "state"},
        {"field": "axis", "title": "path"},
        {"field": "is", "title": "value"},
    ]
    # Lines follow the order of the axes, not of the alphabet.
    line = {"x": x, "y": y, "detail": {"field": "trial"}, "order": {"field": "place", "type": "quantitative"}}
    wide = {"condition": {"test": "datum.best", "value": 4}, "value": 1.5}
    return {
        "data": {"values": points},
        "layer": [
            {
                "transform": [{"filter": "!isValid(datum.value)"}],
                "mark": {"type": "line", "color": SOFT, "opacity": 0.5, "strokeDash": [3, 3], "strokeWidth": 1},
                "encoding": line,
            },
            {
                "transform": [{"filter": "isValid(datum.value)"}],
                "mark": {"type": "line"},
                "encoding": {**line, "color": colour, "strokeWidth": wide},
            },
            {"mark": {"type": "point", "opacity": 0, "size": 120}, "encoding": {"x": x, "y": y, "tooltip": tooltip}},
            # In the colour of the ground first, so that lines behind the text do not cross it.
            *(
                {
                    "data": {"values": ticks},
                    "mark": {"type": "text", "align": "right", "dx": -6, "fontSize": 11, **stroke},
                    "encoding": {"x": x, "y": y, "text": {"field": "is"}},
                }
                for stroke in ({"color": GROUND, "stroke": GROUND, "strokeWidth": 4}, {"color": INK})
            ),
        ],
        "height": 340,
    }


@dataclass(frozen=True)
class _Scale:
    """An axis, from 0 to 1."""

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
        if are_numbers(values):
            return cls.of_numbers([float(value) for value in values], is_log=is_log(tune, path, values))
        choices = [found for _, mine, found in searched(tune) if mine == path and isinstance(found, Choice)]
        known = [option_of(choice, label) for choice in choices for label in labels(choice)]
        # Lists are no keys, so options are told apart as their JSON.
        options = tuple({json.dumps(o): o for o in known if o in values}.values())
        heights = np.linspace(0, 1, len(options)) if len(options) > 1 else np.array([0.5])
        ticks = tuple((float(y), cut(shown(o))) for y, o in zip(heights, options, strict=True))
        return cls(0.0, 1.0, False, ticks, options)

    @classmethod
    def of_numbers(cls, values: Sequence[float], *, is_log: bool, few: int = _FEW) -> _Scale:
        bare = cls(min(values), max(values), is_log, ())
        ticks: list[tuple[float, str]] = []
        for value in _tick_values(values, is_log, few):
            position = bare.position(value)
            if not ticks or position - ticks[-1][0] > _APART:
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
    if is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
        found = [step * 10.0**decade for decade in decades for step in steps]
    else:
        width = 10.0 ** math.floor(math.log10((high - low) / 4))
        width *= next((step for step in (1, 2, 5, 10) if (high - low) / (step * width) <= 6), 10)
        found = [n * width for n in range(math.ceil(low / width), math.floor(high / width) + 1)]
    found = [float(f"{value:.12g}") for value in found if low <= value <= high]
    return found if len(found) > 1 else [low, high]
