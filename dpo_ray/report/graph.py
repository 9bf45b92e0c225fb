"""A graph of what was made of what, drawn downwards: small enough for a phone."""

from __future__ import annotations

import textwrap

from markupsafe import Markup, escape

from dpo_ray.report.document import Graph, Node

_WIDTH, _MARGIN = 340, 8
_BOX, _GAP = 46, 30
_CHARACTER = 6.4  # pixels of one, about, at 12 pixels


def layers(graph: Graph) -> list[list[Node]]:
    """The nodes by the longest way to them; those that are given stand just above the first that needs them."""
    above: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    for start, end in graph.arrows:
        above[end].append(start)
    depth: dict[str, int] = {}
    for node in graph.nodes:  # downstream, so that all above are known
        depth[node.name] = max((depth[name] + 1 for name in above[node.name]), default=0)
    for node in graph.nodes:
        below = [depth[end] for start, end in graph.arrows if start == node.name]
        if node.kind == "given" and below:
            depth[node.name] = min(below) - 1
    found: list[list[Node]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node in graph.nodes:
        found[depth[node.name]].append(node)
    return found


def drawing(graph: Graph) -> Markup:
    """As SVG in the page's own colours; what it says is told to who does not see it, too."""
    rows = layers(graph)
    places: dict[str, tuple[float, float, float]] = {}
    parts: list[Markup] = []
    for depth, row in enumerate(rows):
        width = (_WIDTH - 2 * _MARGIN - 12 * (len(row) - 1)) / len(row)
        width = min(width, 220.0)
        left = (_WIDTH - width * len(row) - 12 * (len(row) - 1)) / 2
        for n, node in enumerate(row):
            x, y = left + n * (width + 12), _MARGIN + depth * (_BOX + _GAP)
            places[node.name] = (x, y, width)
            parts.append(_box(node, x, y, width))
    arrows = [_arrow(*places[start], *places[end], skips=_skips(rows, start, end)) for start, end in graph.arrows]
    height = 2 * _MARGIN + len(rows) * _BOX + (len(rows) - 1) * _GAP
    names = {node.name: node.label for node in graph.nodes}
    said = "; ".join(f"{names[start]} to {names[end]}" for start, end in graph.arrows)
    head = Markup(
        '<svg class="graph" viewBox="0 0 {} {}" role="img" aria-label="{}">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="var(--soft)"/></marker></defs>'
    ).format(_WIDTH, height, f"What was made of what: {said}")
    return head + Markup("").join(arrows) + Markup("").join(parts) + Markup("</svg>")


def _box(node: Node, x: float, y: float, width: float) -> Markup:
    most = max(6, int(width / _CHARACTER) - 2)
    label, note = (
        textwrap.shorten(text, most, placeholder="…") if " " in text else _cut(text, most)
        for text in (node.label, node.note)
    )
    middle = x + width / 2
    return Markup(
        '<g class="node {}"><title>{}</title><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="6"/>'
        '<text x="{:.1f}" y="{:.1f}" class="label">{}</text><text x="{:.1f}" y="{:.1f}" class="note">{}</text></g>'
    ).format(
        node.kind, f"{node.label}: {node.note}", x, y, width, _BOX,
        middle, y + (19 if node.note else 28), label, middle, y + 36, note,
    )  # fmt: skip


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _skips(rows: list[list[Node]], start: str, end: str) -> bool:
    depth = {node.name: n for n, row in enumerate(rows) for node in row}
    return depth[end] - depth[start] > 1


def _arrow(x: float, y: float, width: float, to_x: float, to_y: float, to_width: float, *, skips: bool) -> Markup:
    """From the lower edge of a box to the upper edge of another; one that skips a row goes by the side."""
    if skips:
        side = _WIDTH - 4.0 if x + width / 2 >= _WIDTH / 2 else 4.0
        edge = x + width if side > _WIDTH / 2 else x
        to_edge = to_x + to_width if side > _WIDTH / 2 else to_x
        middle, to_middle = y + _BOX / 2, to_y + _BOX / 2
        path = (
            f"M{edge:.1f},{middle:.1f} C{side:.1f},{middle:.1f} {side:.1f},{middle:.1f} {side:.1f},{middle + 20:.1f} "
            f"L{side:.1f},{to_middle - 20:.1f} "
            f"C{side:.1f},{to_middle:.1f} {side:.1f},{to_middle:.1f} {to_edge:.1f},{to_middle:.1f}"
        )
        return Markup('<path class="arrow" d="{}" marker-end="url(#tip)"/>').format(escape(path))
    begin, end = x + width / 2, to_x + to_width / 2
    bend = (y + _BOX + to_y) / 2
    path = f"M{begin:.1f},{y + _BOX:.1f} C{begin:.1f},{bend:.1f} {end:.1f},{bend:.1f} {end:.1f},{to_y:.1f}"
    return Markup('<path class="arrow" d="{}" marker-end="url(#tip)"/>').format(path)
