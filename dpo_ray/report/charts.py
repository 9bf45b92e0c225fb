"""Kinds of charts, each a function of what it shows: the spec, and the same figures as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dpo_ray.report.curves import Curve
from dpo_ray.report.document import Chart, Table
from dpo_ray.report.shown import interval, number
from dpo_ray.report.vega import INK, SERIES, SOFT

_ROW, _AROUND = 26, 58  # pixels of a row of dots or bars, and of the axis below them
_LABEL = 190  # pixels of a row's label, at most
_TOLD_APART = 40  # points of a curve that have a mark each
_TABLE_ROWS = 25  # of a curve's table


def _named(values: Sequence[str]) -> dict[str, Any]:
    return {"scale": {"domain": list(values), "range": list(SERIES[: len(values)])}}


def histogram(title: str, says: str, found: Mapping[str, Any], unit: str, *, at: float | None = None) -> Chart:
    """Shares of one or two samples by the same bins.

    Args:
        found: as of dpo_ray.evaluation.histogram.
        at: where a line says what equals are.
    """
    edges, counts = found["edges"], found["counts"]
    totals = {name: sum(of_name) or 1 for name, of_name in counts.items()}
    values = [
        {"from": low, "to": high, "share": count / totals[name], "of": name, "count": count}
        for name, of_name in counts.items()
        for low, high, count in zip(edges[:-1], edges[1:], of_name, strict=True)
    ]
    tooltip = [
        {"field": "of", "title": "of"},
        {"field": "from", "format": ".4g"},
        {"field": "to", "format": ".4g"},
        {"field": "count", "title": "how many"},
        {"field": "share", "format": ".1%"},
    ]
    bars = {
        "mark": {"type": "bar", "opacity": 0.55 if len(counts) > 1 else 0.9, "binSpacing": 0},
        "encoding": {
            "x": {
                "field": "from",
                "type": "quantitative",
                "title": unit,
                "scale": {"zero": False},
                "axis": {"tickCount": 6},
            },
            "x2": {"field": "to"},
            "y": {
                "field": "share",
                "type": "quantitative",
                "stack": None,
                "scale": {"domainMin": 0},
                "title": "share",
                "axis": {"format": "%", "tickCount": 4},
            },
            "y2": {"datum": 0},
            "color": {
                "field": "of",
                "type": "nominal",
                "title": None,
                **_named(list(counts)),
                **({} if len(counts) > 1 else {"legend": None}),
            },
            "tooltip": tooltip,
        },
    }
    layers: list[dict[str, Any]] = [bars]
    if at is not None and edges[0] <= at <= edges[-1]:
        rule = {"mark": {"type": "rule", "strokeDash": [4, 3], "color": INK}, "encoding": {"x": {"datum": at}}}
        layers.append(rule)
    rows = [
        [f"{number(low)} to {number(high)}", *(f"{of_name[n]:,}" for of_name in counts.values())]
        for n, (low, high) in enumerate(pairwise(edges))
        if any(of_name[n] for of_name in counts.values())
    ]
    open_ends = " The first and the last bar hold what lies beyond them." if found.get("is_open") else ""
    table = Table([unit, *counts], rows)
    return Chart(title, f"{says}{open_ends}", {"data": {"values": values}, "layer": layers}, table)


def intervals(
    title: str,
    says: str,
    found: Sequence[tuple[str, Mapping[str, Any]]],
    unit: str,
    *,
    at: float | None = None,
    domain: tuple[float, float] | None = None,
) -> Chart:
    """Estimates below each other, each with its 95% interval. found: label and value, low, high, n."""
    values = [{"name": name, **{key: one[key] for key in ("value", "low", "high", "n")}} for name, one in found]
    order = [name for name, _ in found]
    y = {
        "field": "name",
        "type": "nominal",
        "sort": order,
        "title": None,
        "axis": {"labelLimit": _LABEL, "ticks": False, "domain": False, "labelColor": INK, "labelPadding": 8},
    }
    scale = {"domain": list(domain)} if domain is not None else {"zero": False}
    x = {"field": "low", "type": "quantitative", "title": unit, "scale": scale, "axis": {"tickCount": 5}}
    tooltip = [
        {"field": "name", "title": "of"},
        *({"field": key, "format": ".3f"} for key in ("value", "low", "high")),
        {"field": "n"},
    ]
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "rule", "strokeWidth": 3, "color": SERIES[0], "opacity": 0.6},
            "encoding": {"x": x, "x2": {"field": "high"}, "y": y, "tooltip": tooltip},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 90, "color": SERIES[0], "opacity": 1},
            "encoding": {"x": {"field": "value", "type": "quantitative"}, "y": y, "tooltip": tooltip},
        },
    ]
    if at is not None:
        layers.insert(
            0, {"mark": {"type": "rule", "strokeDash": [4, 3], "color": SOFT}, "encoding": {"x": {"datum": at}}}
        )
    rows = [[name, number(one["value"]), interval(one), f"{one['n']:,}"] for name, one in found]
    spec = {"data": {"values": values}, "layer": layers, "height": _ROW * len(found) + _AROUND}
    return Chart(title, says, spec, Table(["", unit, "95% interval", "n"], rows))


def bars(title: str, says: str, found: Mapping[str, float], unit: str, *, number_format: str = ",.4~g") -> Chart:
    """Quantities below each other, as they come."""
    values = [{"name": name, "value": value} for name, value in found.items()]
    encoding = {
        "x": {"field": "value", "type": "quantitative", "title": unit, "axis": {"tickCount": 5}},
        "y": {
            "field": "name",
            "type": "nominal",
            "sort": list(found),
            "title": None,
            "axis": {"labelLimit": _LABEL, "ticks": False, "domain": False, "labelColor": INK, "labelPadding": 8},
        },
        "tooltip": [{"field": "name", "title": "of"}, {"field": "value", "title": unit, "format": number_format}],
    }
    mark = {"type": "bar", "color": SERIES[0], "cornerRadiusEnd": 2, "height": {"band": 0.7}}
    spec = {"data": {"values": values}, "mark": mark, "encoding": encoding, "height": 20 * len(found) + _AROUND}
    return Chart(title, says, spec, Table(["", unit], [[name, number(value)] for name, value in found.items()]))


def curves(title: str, says: str, trained: Curve | None, held_out: Curve | None, unit: str) -> Chart | None:
    """A metric over the steps: of training batches as it is and smoothed, and of held-out pairs on the same axes."""
    shown: list[tuple[str, list[int], list[float]]] = []
    band: list[dict[str, float]] = []
    if trained is not None:
        raw = "means of steps" if trained.is_thinned else "each step"
        shown += [(raw, trained.steps, trained.raw), ("smoothed", trained.steps, trained.smooth)]
        if trained.is_thinned:
            places = zip(trained.steps, trained.low, trained.high, strict=True)
            band = [{"step": step, "low": low, "high": high} for step, low, high in places]
    if held_out is not None:
        shown.append(("held out", held_out.steps, held_out.raw))
    if not shown:
        return None
    names = [name for name, *_ in shown]
    values = [
        {"step": step, "value": value, "of": name}
        for name, steps, of_name in shown
        for step, value in zip(steps, of_name, strict=True)
    ]
    x = {
        "field": "step",
        "type": "quantitative",
        "title": "step",
        "axis": {"tickMinStep": 1, "tickCount": 6, "format": ",d"},
    }
    x["scale"] = {"zero": False, "nice": False}
    y = {"field": "value", "type": "quantitative", "title": unit, "scale": {"zero": False}}
    colours = [{"smoothed": SERIES[0], "held out": SERIES[1]}.get(name, SOFT) for name in names]
    color = {"field": "of", "type": "nominal", "title": None, "scale": {"domain": names, "range": colours}}
    seen = {"condition": {"param": "of", "value": 1}, "value": 0.12}
    wide = {"condition": {"test": "datum.of === 'smoothed'", "value": 2.5}, "value": 1.25}
    layers: list[dict[str, Any]] = []
    if band:
        area = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}
        layers.append(
            {"data": {"values": band}, "mark": {"type": "area", "color": SOFT, "opacity": 0.2}, "encoding": area}
        )
    points = {
        "transform": [{"filter": "datum.of === 'held out'"}],
        "mark": {"type": "point", "filled": True, "size": 45},
        "encoding": {"x": x, "y": y, "color": color, "opacity": seen},
    }
    layers += [
        {
            "params": [{"name": "of", "select": {"type": "point", "fields": ["of"]}, "bind": "legend"}],
            "mark": {"type": "line", "interpolate": "linear"},
            "encoding": {"x": x, "y": y, "color": color, "opacity": seen, "strokeWidth": wide},
        },
        *([points] if held_out is not None and len(held_out.steps) <= _TOLD_APART else []),
        {
            "transform": [{"pivot": "of", "value": "value", "groupby": ["step"]}],
            "params": [
                {
                    "name": "at",
                    "select": {
                        "type": "point",
                        "fields": ["step"],
                        "nearest": True,
                        "on": "pointerover",
                        "clear": "pointerout",
                    },
                }
            ],
            "mark": {"type": "rule", "color": SOFT},
            "encoding": {
                "x": x,
                "opacity": {"condition": {"param": "at", "empty": False, "value": 0.7}, "value": 0},
                "tooltip": [
                    {"field": "step", "type": "quantitative", "format": ",d"},
                    *({"field": name, "type": "quantitative", "format": ".4g"} for name in names),
                ],
            },
        },
    ]
    return Chart(title, says, {"data": {"values": values}, "layer": layers}, _curve_table(trained, held_out, unit))


def _curve_table(trained: Curve | None, held_out: Curve | None, unit: str) -> Table:
    """Some of the points, the first and the last among them."""
    rows: dict[int, list[str]] = {}
    if trained is not None:
        every = max(1, -(-(len(trained.steps) - 1) // _TABLE_ROWS))
        for n in sorted({*range(0, len(trained.steps), every), len(trained.steps) - 1}):
            rows[trained.steps[n]] = [number(trained.raw[n], 4), number(trained.smooth[n], 4), "–"]
    if held_out is not None:
        every = max(1, -(-(len(held_out.steps) - 1) // _TABLE_ROWS))
        for n in sorted({*range(0, len(held_out.steps), every), len(held_out.steps) - 1}):
            rows.setdefault(held_out.steps[n], ["–", "–", "–"])[2] = number(held_out.raw[n], 4)
    head = ["step", f"{unit}, training", "smoothed", "held out"]
    return Table(head, [[f"{step:,}", *rows[step]] for step in sorted(rows)])
