"""A document → one HTML file that needs nothing else, and the same as Markdown."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from dpo_ray.report.document import Chart, Code, Document, Graph, Links, Paragraph, Samples, Table
from dpo_ray.report.graph import drawing as graph_drawing
from dpo_ray.report.vega import drawing, full, script


def html_page(document: Document) -> str:
    """With its charts drawn, and drawn again with values under the pointer where scripts run."""
    charts = document.charts
    numbered = {id(chart): n for n, chart in enumerate(charts)}
    specs = [full(chart.spec, width="container") for chart in charts]
    return (
        _environment(autoescape=True)
        .get_template("page.html")
        .render(
            document=document,
            style=_file("style.css"),
            script=Markup(script()) if charts else None,
            page_script=_file("page.js"),
            specs=Markup(_as_json(specs)),
            number_of=lambda chart: numbered[id(chart)],
            drawn=lambda chart: Markup(drawing(chart.spec, f"chart-{numbered[id(chart)]}")),
            graph=graph_drawing,
        )
    )


def markdown_page(document: Document) -> str:
    """With the figures of charts as tables."""
    return _environment(autoescape=False).get_template("page.md").render(document=document)


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dpo_ray.report"),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    kinds = {Paragraph, Table, Chart, Graph, Code, Links, Samples}
    environment.globals["kind"] = lambda block: type(block).__name__ if type(block) in kinds else None
    environment.filters |= {"cell": _cell, "quoted": _quoted, "fenced": _fenced, "text": _text}
    return environment


def _file(name: str) -> Markup:
    return Markup((files("dpo_ray.report") / "templates" / name).read_text(encoding="utf-8"))


def _as_json(value: Any) -> str:
    """For a script element, out of which nothing of it can lead."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]<>#|~$!&"})


def _text(text: str) -> str:
    """Text of others as a line of Markdown that is nothing but text."""
    return " ".join(text.translate(_MARKS).split())


def _cell(text: str) -> str:
    return _text(text) or " "


def _quoted(text: str) -> str:
    """Text of others as a quotation, line by line."""
    return "\n".join(f"> {line.translate(_MARKS)}  " for line in text.splitlines() or [""])


def _fenced(text: str) -> str:
    """As code, in a fence that the text cannot end."""
    longest = max((len(run) for run in _ticks(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _ticks(text: str) -> list[str]:
    return [run for run in "".join(c if c == "`" else " " for c in text).split() if run]
