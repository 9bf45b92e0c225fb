"""How trials went on, which values decide, and what one objective costs in the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_ray.config import Tune
from dpo_ray.report.charts import bars
from dpo_ray.report.document import Chart, Table
from dpo_ray.report.vega import INK, SERIES, SOFT
from tuning.heat_map import SHAPES, STAR
from tuning.measures import pareto_front
from tuning.objectives import better, rounded, shown_objectives
from tuning.records import Trial
from tuning.searched import best_of, curve_of, finished, shares_of_importance

_KINDS = {"best": SERIES[0], "finished": SERIES[3], "stopped": SOFT, "diverged": SERIES[1], "failed": SOFT}
_ENDS_OF = ("value", "low", "high")
_MOST_NAME = 40  # characters of a path beside a bar


def learning_curves(tune: Tune, trials: Sequence[Trial], best: int | None = None) -> Chart | None:
    """The first objective at each evaluation against the optimizer step, a line a trial; of the best one also the 95%
    intervals.

    A trial that diverged before its first evaluation is a cross on the lower edge, at the step that it came to. None
    where fewer than two trials were measured, or none twice.

    Args:
        trials, best: as of tuning.heat_map.heat_maps.
    """
    objective = shown_objectives(tune)[0]
    curves = {trial.number: curve_of(objective, trial) for trial in trials}
    measured = [trial for trial in trials if curves[trial.number]]
    if len(measured) < 2 or all(len(curve) < 2 for curve in curves.values()):
        return None
    done = finished(tune, trials)
    marked = best if best is not None or not done else best_of(tune, done)
    points: list[dict[str, Any]] = [
        {
            "trial": trial.number,
            "of": _kind(trial, marked),
            "step": step,
            **{key: one[key] for key in ("value", "low", "high")},
        }
        for trial in measured
        for step, one in curves[trial.number]
    ]
    crosses: list[dict[str, Any]] = [
        {"trial": trial.number, "of": "diverged", "step": trial.step}
        for trial in trials
        if trial.state == "diverged" and not curves[trial.number]
    ]
    present = {point["of"] for point in [*points, *crosses]}
    kinds = [kind for kind in _KINDS if kind in present] + sorted(present - _KINDS.keys())
    x = {
        "field": "step",
        "type": "quantitative",
        "title": "optimizer step",
        "axis": {"tickMinStep": 1, "tickCount": 6, "format": ",d"},
    }
    y = {
        "field": "value",
        "type": "quantitative",
        "title": f"{objective.name} ({objective.unit})",
        "scale": {"zero": False},
    }
    colour = {
        "field": "of",
        "type": "nominal",
        "title": None,
        "scale": {"domain": kinds, "range": [_KINDS.get(kind, SOFT) for kind in kinds]},
    }
    tooltip = [
        {"field": "trial"},
        {"field": "of", "title": "state"},
        {"field": "step"},
        *({"field": key, "format": ".4~g"} for key in _ENDS_OF),
    ]
    wide = {"condition": {"test": "datum.of === 'best'", "value": 3}, "value": 1.2}
    line = {"x": x, "y": y, "color": colour, "detail": {"field": "trial"}}
    is_best = {"transform": [{"filter": "datum.of === 'best'"}]}
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "line"},
            "encoding": {
                **line,
                "strokeWidth": wide,
            },
        },
        {"mark": {"type": "point", "filled": True, "size": 40, "opacity": 1}, "encoding": {**line, "tooltip": tooltip}},
    ]
    if "best" in kinds:
        band = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}
        layers.insert(0, {**is_best, "mark": {"type": "area", "color": SERIES[0], "opacity": 0.15}, "encoding": band})
    if crosses:
        edge = {"x": x, "y": {"value": "height"}, "color": colour, "tooltip": tooltip[:3]}
        layers.append(
            {"data": {"values": crosses}, "mark": {"type": "point", "shape": "cross", "size": 80}, "encoding": edge}
        )
    rows = [
        [str(one["trial"]), one["of"], f"{one['step']:,}", *(f"{one[key]:.4g}" for key in ("value", "low", "high"))]
        for one in points
    ] + [[str(one["trial"]), one["of"], f"{one['step']:,}", "–", "–", "–"] for one in crosses]
    says = (
        f"Each line is a trial, from evaluation to evaluation ({better(objective)}); of the best one with its 95% "
        "intervals. Curves that still rise at their end ask for more steps, and those within the band of the best one "
        "may be as good as it. A cross says that the trial diverged before its first evaluation."
    )
    spec = {"data": {"values": points}, "layer": layers, "height": 280}
    return Chart(
        "How trials went on", says, spec, Table(["trial", "state", "step", objective.name, "low", "high"], rows)
    )


def _kind(trial: Trial, marked: int | None) -> str:
    return "best" if trial.number == marked else trial.state


def importances(tune: Tune, trials: Sequence[Trial]) -> Chart | None:
    """How much each searched value decided whether a finished trial was among the best by the first objective, by
    Optuna's PED-ANOVA (arXiv:2304.10255), of which the shares add up to 1.

    None with fewer than four finished trials, or where they do not differ in what was searched or measured.
    """
    found = shares_of_importance(tune, trials)
    if found is None:
        return None
    says = (
        "How far the values of the best finished trials stand out from those of all finished ones (PED-ANOVA): a long "
        "bar is a value to choose with care. It tells little with few trials, and nothing of those that were ended "
        "early."
    )
    return bars(
        "Which values decide",
        says,
        {_shortened(name): share for name, share in found.items()},
        "share of the importance",
    )


def _shortened(name: str) -> str:
    """Of a name in points, whose last word says the most."""
    return name if len(name) <= _MOST_NAME else f"{name[:18]}…{name[-20:]}"


def pareto(tune: Tune, trials: Sequence[Trial], best: int | None = None) -> Chart | None:
    """The first two objectives of all finished trials, those of the Pareto front joined; bars are one standard error.

    The front is that of the two objectives that are drawn. None with one objective, or with fewer than two finished
    trials that have both measured.

    Args:
        trials, best: as of tuning.heat_map.heat_maps.
    """
    objectives = shown_objectives(tune)[:2]
    if len(objectives) < 2:
        return None
    both = [(t, [o.of(t.measured) for o in objectives]) for t in trials if t.state == "finished"]
    measured = {t.number: [one for one in mine if one is not None] for t, mine in both if None not in mine}
    if len(measured) < 2:
        return None
    numbers = list(measured)
    signs = [1 if objective.higher_is_better else -1 for objective in objectives]
    places = [(measured[n][0]["value"], measured[n][1]["value"]) for n in numbers]
    front = {numbers[i] for i in pareto_front([(signs[0] * a, signs[1] * b) for a, b in places])}
    marked = best_of(tune, finished(tune, trials)) if best is None else best
    points = [
        {
            "trial": n, "x": x, "y": y, "of": "on the front" if n in front else "finished",
            **_ends("x", x, measured[n][0]["se"]), **_ends("y", y, measured[n][1]["se"]),
            "text": f"{n}{f' {STAR}' if n == marked else ''}" if n in front or n == marked else "",
        }
        for n, (x, y) in zip(numbers, places, strict=True)
    ]  # fmt: skip

    def axis(name: str, n: int) -> dict[str, Any]:
        title = f"{objectives[n].name} ({objectives[n].unit}), {better(objectives[n])}"
        return {"field": name, "type": "quantitative", "title": title, "scale": {"zero": False}}

    x, y = axis("x", 0), axis("y", 1)
    colour = {
        "field": "of",
        "type": "nominal",
        "title": None,
        "scale": {"domain": ["on the front", "finished"], "range": [SERIES[0], SOFT]},
    }
    tooltip = [
        {"field": "trial"},
        *({"field": f, "title": o.name, "format": ".4~g"} for f, o in zip("xy", objectives, strict=True)),
    ]
    error = {"type": "rule", "color": SOFT, "opacity": 0.45}
    # Between two trials of the front what both of them reach is known, and no more: steps, no straight lines.
    steps = "step-before" if objectives[0].higher_is_better else "step-after"
    layers = [
        {"mark": error, "encoding": {"x": {**x, "field": "x_low"}, "x2": {"field": "x_high"}, "y": y}},
        {"mark": error, "encoding": {"x": x, "y": {**y, "field": "y_low"}, "y2": {"field": "y_high"}}},
        {
            "transform": [{"filter": "datum.of === 'on the front'"}],
            "mark": {"type": "line", "interpolate": steps, "color": SERIES[0]},
            "encoding": {"x": x, "y": y},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1, "shape": SHAPES["finished"]},
            "encoding": {"x": x, "y": y, "color": colour, "tooltip": tooltip},
        },
        {
            "mark": {"type": "text", "dx": 8, "dy": -8, "align": "left", "color": INK},
            "encoding": {"x": x, "y": y, "text": {"field": "text"}},
        },
    ]
    rows = [
        [str(n), "yes" if n in front else "no", *(rounded(one["value"], one["se"]) for one in measured[n])]
        for n in numbers
    ]
    corner = f"{'upper' if signs[1] > 0 else 'lower'} {'right' if signs[0] > 0 else 'left'}"
    says = (
        f"Each point is a finished trial, its bars one standard error; better is {corner}. The line joins the trials "
        f"that none is better than in both objectives, and the numbers on it are theirs; {STAR} marks the chosen one."
    )
    table = Table(["trial", "on the front", *(o.name for o in objectives)], rows)
    return Chart(
        "What one objective costs in the other",
        says,
        {"data": {"values": points}, "layer": layers, "height": 320},
        table,
    )


def _ends(axis: str, value: float, error: float) -> dict[str, float]:
    return {f"{axis}_low": value - error, f"{axis}_high": value + error}
