"""Vega-Lite: a chart's drawing for who runs no script, and what draws it for who does.

Both are of the package vl-convert-python, which holds Vega, Vega-Lite and Vega-Embed (all BSD-3-Clause). Colours are
the page's own variables, so that a chart is dark where the page is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

VEGA_LITE = "6.4"
_HEIGHT, _WIDTH = 220, 400
_IDS = re.compile(r'( id="|url\(#|href="#)')
INK, SOFT, GRID, GROUND = "var(--ink)", "var(--soft)", "var(--line)", "var(--ground)"
SERIES = tuple(f"var(--series-{n})" for n in range(1, 5))

_AXIS = {
    "domainColor": SOFT,
    "tickColor": SOFT,
    "gridColor": GRID,
    "labelColor": SOFT,
    "titleColor": INK,
    "labelFontSize": 12,
    "titleFontSize": 12,
    "titleFontWeight": "normal",
}
_CONFIG = {
    "font": "system-ui, sans-serif",
    "background": None,
    "view": {"stroke": None},
    "axis": _AXIS,
    "axisQuantitative": {"labelOverlap": True, "labelFlush": False},
    "legend": {
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "orient": "top",
    },
    "mark": {"color": SERIES[0]},
    "text": {"color": INK, "fontSize": 12},
    "rule": {"color": SOFT},
    "header": {"labelColor": INK, "titleColor": INK},
    "range": {"category": list(SERIES)},
}


def full(spec: Mapping[str, Any], *, width: int | str) -> dict[str, Any]:
    """A chart's spec with size and theme. width: in pixels, or "container"."""
    found = copy.deepcopy(dict(spec))
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "config": _CONFIG,
        "width": width,
        "height": _HEIGHT,
        "autosize": {"type": "fit", "contains": "padding"},
        **found,
    }


def drawing(spec: Mapping[str, Any], name: str) -> str:
    """The chart as SVG that scales. name: begins the ids in it, so that no two drawings of a page share one."""
    # Not above: it brings a JavaScript engine, which only who writes a report needs.
    import vl_convert

    svg: str = vl_convert.vegalite_to_svg(full(spec, width=_WIDTH), vl_version=VEGA_LITE)
    svg = svg[svg.index("<svg") :]
    return _IDS.sub(lambda found: f"{found[1]}{name}-", svg)


@cache
def script() -> str:
    """Vega, Vega-Lite and Vega-Embed, as JavaScript that may stand in a page."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")
