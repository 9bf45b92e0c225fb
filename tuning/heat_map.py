"""Where the best trials lie: the first objective over two searched numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.config import Tune
from dpo_ray.report.document import Chart, Table
from dpo_ray.report.vega import INK, SOFT
from tuning.objectives import ShownObjective, better, rounded, shown, shown_objectives
from tuning.records import Trial
from tuning.searched import (
    best_of,
    finished,
    is_grid,
    is_log,
    most_telling_pair,
    oriented,
    panels_by_loss,
    searched_values,
    value_of,
)

STAR = "★"
Channel = Mapping[str, Any]
"""Of a Vega-Lite encoding."""
_DARK_INK, _LIGHT_INK = "#111111", "#ffffff"
_SMALL = 0.01  # values below it are written with an exponent
_LIGHT_FROM = 0.55  # of the way along the colours, from where dark text is the more readable
SHAPES = {"finished": "circle", "stopped": "square", "diverged": "cross", "failed": "triangle-down"}


def heat_maps(tune: Tune, trials: Sequence[Trial], best: int | None = None) -> list[Chart]:
    """The first objective over β and the learning rate, or over the two numbers that matter most where these two are
    not both searched. Listed values make a grid with the values written in, ranges a scatter.

    Losses have a chart each where β belongs to the loss, for it is not the same quantity in all of them. There is none
    with fewer than two finished trials, or where fewer than two numbers are searched.

    Args:
        trials: the search's own, not those that repeat one.
        best: number of the trial to be marked; left out: the one with the best value.
    """
    pair = most_telling_pair(tune, trials)
    if pair is None:
        return []
    placed = [trial for trial in trials if searched_values(tune, trial).keys() >= set(pair)]
    done = finished(tune, placed)
    if len(done) < 2:
        return []
    marked = best_of(tune, done) if best is None else best
    values = [value_of(tune, trial) for trial in done]
    colour = colours(shown_objectives(tune)[0], min(values), max(values))
    draw = _cells if is_grid(tune, pair) else _points
    return [
        draw(tune, title, members, pair, colour, marked)
        for title, members in panels_by_loss(tune, placed, pair).items()
    ]


def colours(objective: ShownObjective, low: float, high: float) -> dict[str, Any]:
    """The channel by which brighter is better."""
    scale = {"scheme": "viridis", "domain": [low, high], "reverse": not objective.higher_is_better}
    legend = {
        "title": f"{objective.name}, {better(objective)}",
        "gradientLength": 180,
        "tickCount": 4,
        "orient": "bottom",
    }
    return {"field": "value", "type": "quantitative", "scale": scale, "legend": legend}


def _title(title: str) -> str:
    return f"Where the best trials lie{f': {title}' if title else ''}"


def _cells(
    tune: Tune,
    title: str,
    trials: Sequence[Trial],
    pair: tuple[str, str],
    colour: Mapping[str, Any],
    marked: int | None,
) -> Chart:
    """A grid; where several trials share a cell, it shows the best of them."""
    objective = shown_objectives(tune)[0]
    low, high = colour["scale"]["domain"]
    cells: dict[tuple[Any, Any], list[Trial]] = {}
    for trial in trials:
        mine = searched_values(tune, trial)
        cells.setdefault((mine[pair[0]], mine[pair[1]]), []).append(trial)
    values = []
    for (x, y), members in sorted(cells.items(), key=lambda item: (float(item[0][0]), float(item[0][1]))):
        done = finished(tune, members)
        cell: dict[str, Any] = {"x": shown(x), "y": shown(y)}
        if not done:
            values.append({**cell, "text": _ended(members), "trial": members[0].number, "ink": SOFT})
            continue
        shown_one = max(done, key=lambda trial: oriented(tune, trial))
        if marked in {trial.number for trial in done}:
            shown_one = next(trial for trial in done if trial.number == marked)
        value = value_of(tune, shown_one)
        found = objective.of(shown_one.measured)
        assert found is not None
        share = (value - low) / (high - low) if high > low else 1.0
        share = share if objective.higher_is_better else 1 - share
        star = f"{STAR} " if shown_one.number == marked else ""
        ink = _DARK_INK if share > _LIGHT_FROM else _LIGHT_INK
        text = f"{star}{rounded(value, found['se'])}"
        values.append({**cell, "text": text, "value": value, "trial": shown_one.number, "ink": ink})
    rows = sorted({value for _, value in cells}, key=float, reverse=True)
    columns = sorted({value for value, _ in cells}, key=float)
    axis = {"labelAngle": 0, "ticks": False, "domain": False, "grid": False}
    place = {
        "x": {"field": "x", "type": "ordinal", "title": pair[0], "sort": [shown(v) for v in columns], "axis": axis},
        "y": {"field": "y", "type": "ordinal", "title": pair[1], "sort": [shown(v) for v in rows], "axis": axis},
    }
    tooltip = [{"field": "trial"}, {"field": "text", "title": objective.name}]
    layers = [
        {
            "transform": [{"filter": "isValid(datum.value)"}],
            "mark": {"type": "rect", "cornerRadius": 3},
            "encoding": {**place, "color": colour, "tooltip": tooltip},
        },
        {
            "mark": {"type": "text", "fontSize": 12},
            "encoding": {
                **place,
                "text": {"field": "text"},
                "color": {"field": "ink", "type": "nominal", "scale": None},
                "tooltip": tooltip,
            },
        },
    ]
    table = Table(
        [pair[0], pair[1], "trial", objective.name],
        [[one["x"], one["y"], str(one["trial"]), one["text"]] for one in values],
    )
    spec = {
        "data": {"values": values},
        "layer": layers,
        "resolve": {"scale": {"color": "independent"}},
        "height": 44 * len(rows) + 110,
    }
    return Chart(_title(title), _SAYS, spec, table)


def _points(
    tune: Tune,
    title: str,
    trials: Sequence[Trial],
    pair: tuple[str, str],
    colour: Mapping[str, Any],
    marked: int | None,
) -> Chart:
    objective = shown_objectives(tune)[0]
    done = {trial.number for trial in finished(tune, trials)}
    values: list[dict[str, Any]] = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        mine = searched_values(tune, trial)
        at = {"x": float(mine[pair[0]]), "y": float(mine[pair[1]])}
        found = {"value": value_of(tune, trial)} if trial.number in done else {}
        state = "finished" if trial.number in done else trial.state
        values.append({**at, **found, "trial": trial.number, "state": state, "best": trial.number == marked})

    def axis(n: int, name: str) -> dict[str, Any]:
        across = [one[name] for one in values]
        kind = {"type": "log"} if is_log(tune, pair[n], across) else {"zero": False}
        return {
            "field": name,
            "type": "quantitative",
            "title": pair[n],
            "scale": kind,
            "axis": {"format": "~e" if max(across) < _SMALL else "~g", "tickCount": 4, "grid": False},
        }

    place = {"x": axis(0, "x"), "y": axis(1, "y")}
    states = list(dict.fromkeys(one["state"] for one in values))
    shape = {
        "field": "state",
        "type": "nominal",
        "title": None,
        "scale": {"domain": states, "range": [SHAPES.get(state, "diamond") for state in states]},
        **({} if len(states) > 1 else {"legend": None}),
    }
    tooltip = [
        {"field": "trial"},
        {"field": "state"},
        {"field": "x", "title": pair[0], "format": ".3~g"},
        {"field": "y", "title": pair[1], "format": ".3~g"},
        {"field": "value", "title": objective.name, "format": ".4~g"},
    ]
    ended = {
        "transform": [{"filter": "!isValid(datum.value)"}],
        "mark": {"type": "point", "size": 60, "color": SOFT},
        "encoding": {**place, "shape": shape, "tooltip": tooltip},
    }
    star = {
        "transform": [{"filter": "datum.best"}],
        "mark": {"type": "text", "text": STAR, "fontSize": 20, "dy": -14, "color": INK},
        "encoding": {**place, "tooltip": tooltip},
    }
    coloured = {
        "transform": [{"filter": "isValid(datum.value)"}],
        "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1, "stroke": SOFT, "strokeWidth": 0.5},
        "encoding": {**place, "shape": shape, "color": colour, "tooltip": tooltip},
    }
    layers = [
        *([ended] if len(done) < len(values) else []),
        *([coloured] if done else []),
        *([star] if any(one["best"] for one in values) else []),
    ]
    rows = [
        [
            str(one["trial"]),
            one["state"],
            shown(one["x"]),
            shown(one["y"]),
            shown(one["value"]) if "value" in one else "–",
        ]
        for one in values
    ]
    table = Table(["trial", "state", pair[0], pair[1], objective.name], rows)
    return Chart(_title(title), _SAYS, {"data": {"values": values}, "layer": layers, "height": 320}, table)


_SAYS = (
    f"Brighter is better, {STAR} marks the best. Look for a bright region and not for a single bright spot: good "
    "neighbours say that the best trial is no stroke of luck, and a best trial at the edge that the space ends too "
    "early."
)


def _ended(trials: Sequence[Trial]) -> str:
    """Of a cell in which nothing finished."""
    stopped = [trial.step for trial in trials if trial.state == "stopped"]
    return f"stopped at {max(stopped)}" if stopped else trials[0].state
