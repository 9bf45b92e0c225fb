"""The results as they come, and as tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.record import table


def markdown(results: Sequence[Mapping[str, Any]], on: str) -> str:
    """A table for each part, what failed with its last line.

    results: of each part its `part`, `about`, `seconds`, and one of `rows`, `failed` and `left_out`.
    """
    lines = [f"## {datetime.now(UTC):%Y-%m-%d}", "", on]
    for result in results:
        lines += ["", f"### {result['part']} ({result['seconds']:.0f} s)", "", result["about"], ""]
        if "rows" in result:
            heads = list(dict.fromkeys(name for row in result["rows"] for name in row))
            lines.append(table(heads, [[_cell(row.get(name)) for name in heads] for row in result["rows"]]))
        else:
            lines.append(result["left_out"] if "left_out" in result else f"Failed: {result['failed']}")
    return "\n".join(lines) + "\n"


def read(folder: Path) -> list[dict[str, Any]]:
    """Of each part that has ended, in their order."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
