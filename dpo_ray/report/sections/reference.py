"""Calibration: whether the engine that scored the reference computes the model that is trained."""

from __future__ import annotations

from typing import Any

from dpo_ray.report.document import Block, Chart, Paragraph, Section, Table
from dpo_ray.report.facts import Facts
from dpo_ray.report.vega import INK, SERIES, SOFT

_QUANTILES = ("p50", "p90", "p99", "max")
_LEAST = 1e-9  # where a logarithm has to be drawn of nothing


def reference_section(facts: Facts) -> Section | None:
    found = facts.summary.get("reference")
    if not found or "calibration" not in found:
        return None
    measured = found["calibration"]
    error = measured["bias_standard_error"]
    limits = facts.config.reference.tolerance.limits(facts.config.model.dtype)
    rows = [
        ("mean of Δ per token", abs(measured["bias_per_token"]), limits.bias_per_token, "bias_per_token"),
        ("p99 of |Δ| per token", measured["token"]["p99"], limits.p99_per_token, "p99_per_token"),
        ("worst token, median", measured["worst_token"]["p50"], limits.worst_token, "worst_token"),
    ]
    blocks: list[Block] = [
        Paragraph(
            f"The reference was scored by {found.get('engine') or 'the reference engine'}; the trainer's own forward "
            f"scored {measured['num_sequences']:,} of its completions ({measured['num_tokens']:,} tokens) again. Δ is "
            f"the difference of their log-probabilities: {measured['bias_per_token']:+.1e}"
            f"{'' if error is None else f' ± {error:.1e}'} nats a token on the mean."
        ),
        _chart(rows),
        Table(
            ["|Δ| in nats", *_QUANTILES],
            [[label, *(f"{measured[name][q]:.1e}" for q in _QUANTILES)] for name, label in _MEASURES.items()],
        ),
    ]
    return Section("calibration", "Calibration of the reference", blocks)


_MEASURES = {
    "token": "per token",
    "worst_token": "of a completion's worst token",
    "sequence": "per sequence",
}


def _chart(rows: list[tuple[str, float, float, str]]) -> Chart:
    shares = [max(value / limit, _LEAST) for _, value, limit, _ in rows]
    values = [
        {"name": name, "share": share, "value": value, "limit": limit}
        for (name, value, limit, _), share in zip(rows, shares, strict=True)
    ]
    y = {
        "field": "name",
        "type": "nominal",
        "sort": [name for name, *_ in rows],
        "title": None,
        "axis": {"labelLimit": 190, "ticks": False, "domain": False, "labelColor": INK, "labelPadding": 8},
    }
    scale = {"type": "log", "domainMax": 3, "domainMin": min(0.01, *(share / 2 for share in shares))}
    x = {
        "field": "share",
        "type": "quantitative",
        "title": "share of its limit",
        "scale": scale,
        "axis": {"format": "~%", "tickCount": 4, "labelOverlap": True},
    }
    tooltip: list[dict[str, Any]] = [
        {"field": "name", "title": "of"},
        *({"field": key, "format": ".2e", "title": f"{key}, nats"} for key in ("value", "limit")),
    ]
    layers = [
        {"mark": {"type": "rule", "strokeDash": [4, 3], "color": SOFT}, "encoding": {"x": {"datum": 1}}},
        {
            "mark": {"type": "point", "filled": True, "size": 110, "color": SERIES[0], "opacity": 1},
            "encoding": {"x": x, "y": y, "tooltip": tooltip},
        },
    ]
    table = Table(
        ["", "nats", "limit", "share of it", "reference.tolerance"],
        [[name, f"{value:.1e}", f"{limit:g}", f"{value / limit:.1%}", key] for name, value, limit, key in rows],
        code=frozenset({4}),
    )
    says = (
        "Each measure as a share of the limit that it must keep below, on a logarithmic scale; the line is the limit."
    )
    return Chart("How far below its limits", says, {"data": {"values": values}, "layer": layers, "height": 140}, table)
