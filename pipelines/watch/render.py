"""How a run stands, as a terminal shows it, whatever its width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipelines.watch.reading import Look
from pipelines.watch.sparkline import sparkline

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_MARKS = {"done": ("✓", "green"), "reused": ("✓", "dim"), "at work": ("▶", "bold"), "to do": ("○", "dim")}
_STOPPED = ("✗", "red")
_COLOURS = {
    "ended": "",
    "running": "green",
    "waiting": "yellow",
    "silent": "yellow",
    "dead": "red",
    "unknown": "yellow",
}
_LAST_LINES = 5
_NAMES = 10
"""Columns that the names of metrics take, and each number."""
_NUMBER = 9


def render(look: Look, width: int) -> RenderableType:
    """width: columns of the terminal."""
    from rich.console import Group

    parts: list[RenderableType] = [_head(look)]
    if stages := list(_stages(look)):
        parts.append(_stage_table(stages))
    parts += _counts(look)
    if look.training is not None:
        parts.append(_training(look.training))
        parts.append(_curves(look.training, width))
    if trials := look.progress.get("trials"):
        parts.append(_trials(trials))
    parts += _end(look) if look.summary is not None else _said(look)
    return Group(*parts)


def _head(look: Look) -> Text:
    from rich.text import Text

    seconds = (look.summary or look.progress).get("seconds")
    parts = [look.run_id, *([" ".join(look.progress["command"])] if look.progress else []), _time(seconds)]
    head = Text(" · ".join(part for part in parts if part), "bold")
    return Text("\n").join([head, Text(look.outcome, _COLOURS[look.state])])


def _stages(look: Look) -> Iterator[tuple[str, str, float | None, int | None]]:
    """Name, state, seconds and rows of each stage: those that ended, that at work, those to come."""
    ended = _ended(look)
    at = look.progress.get("at") or {}
    for name, (reused, seconds, rows) in ended.items():
        yield name, "reused" if reused else "done", seconds, rows
    current: str | None = at.get("stage")
    completed = look.summary is not None and look.summary["exit_code"] == 0
    if current is not None and current not in ended and not completed:
        state = "at work" if look.state in {"running", "waiting"} else "stopped"
        yield current, state, at["seconds"], None
    if look.summary is None:
        plan = list(look.progress.get("plan", ()))
        seen = [stage.partition(" (")[0] for stage in [*ended, *([current] if current else [])]]
        reached = max((plan.index(stage) for stage in seen if stage in plan), default=-1)
        yield from ((stage, "to do", None, None) for stage in plan[reached + 1 :])


def _ended(look: Look) -> dict[str, tuple[bool, float, int | None]]:
    if look.summary is not None:
        stages = look.summary["stages"].items()
        return {name: (one["reused"], one["seconds"], one["rows"]["kept"]) for name, one in stages}
    stages = look.progress.get("stages", {}).items()
    return {name: (one["reused"], one["seconds"], one["rows"]) for name, one in stages}


def _stage_table(stages: Sequence[tuple[str, str, float | None, int | None]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "stage", "state", "time", "rows", box=None, pad_edge=False, header_style="dim")
    table.columns[3].justify = table.columns[4].justify = "right"
    for name, state, seconds, rows in stages:
        mark, style = _MARKS.get(state, _STOPPED)
        cells = (mark, name, state, _time(seconds), "" if rows is None else f"{rows}")
        table.add_row(*(Text(cell, style, no_wrap=True, overflow="ellipsis") for cell in cells))
    return table


def _counts(look: Look) -> list[RenderableType]:
    """What is counted, while it is at work; and what is waited for."""
    from rich.text import Text

    if look.summary is not None:
        return []
    found: list[RenderableType] = []
    for one in look.progress.get("counts", ()):
        parts = [
            f"{one['stage']}: {one['done']}/{one['total']} {one['unit']}",
            *([f"{one['parts_done']}/{one['parts']} shards"] if one["parts"] else []),
            f"{one['rate']:.3g} {one['unit']}/s",
            *([f"{_time(one['seconds_left'])} left"] if one["seconds_left"] is not None else []),
        ]
        found.append(Text(" · ".join(parts)))
    if look.progress.get("waits_for"):
        found.append(Text(f"waits: {look.progress['waits_for']}", "yellow"))
    return found


def _training(training: Mapping[str, Any]) -> Text:
    from rich.text import Text

    speed, left, memory = (training[name] for name in ("tokens_per_second", "seconds_left", "gpu_memory"))
    more = training["step"] < training["num_steps"]
    parts = [
        f"step {training['step']} of {training['num_steps']}",
        *([f"{training['skipped']} left out"] if training["skipped"] else []),
        *([f"{speed:.0f} tokens/s"] if speed is not None else []),
        *([f"{_time(left)} left"] if more and left is not None else []),
        *([f"GPU memory {memory[0] / 2**30:.1f} of {memory[1] / 2**30:.1f} GiB"] if memory is not None else []),
    ]
    return Text(" · ".join(parts))


def _curves(training: Mapping[str, Any], width: int) -> RenderableType:
    from rich.table import Table

    room = max(4, (width - _NAMES - 2 * _NUMBER - 4) // 2)
    table = Table("", "train", "", "held out", "", box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    names = dict.fromkeys([*training["trained"], *training["held_out"]])
    for name in names:
        cells = []
        for side in ("trained", "held_out"):
            curve = training[side].get(name)
            cells += [f"{curve['last']:.4f}", sparkline(curve["points"], room)] if curve is not None else ["", ""]
        table.add_row(name, *cells)
    return table


def _trials(trials: Sequence[Sequence[str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    head, *rows = trials
    table = Table(*head, box=None, pad_edge=False, header_style="dim")
    for row in rows:
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))
    return table


def _said(look: Look) -> list[RenderableType]:
    from rich.text import Text

    lines = look.progress.get("said", [])[-_LAST_LINES:]
    return [Text(f"{one['time'][11:19]} [{one['stage']}] {one['text']}", "dim") for one in lines]


def _end(look: Look) -> list[RenderableType]:
    from rich.text import Text

    summary = look.summary
    assert summary is not None
    evaluation = summary.get("eval") or {}
    lines: list[RenderableType] = []
    for key, name in (("accuracy", "Held-out accuracy"), ("win_rate", "Win rate")):
        if found := evaluation.get(key):
            interval = f"95% interval {found['low']:.3f} to {found['high']:.3f}"
            lines.append(Text(f"{name}: {found['value']:.3f}, {interval} (n={found['n']})"))
    if summary["published"]:
        lines.append(Text(f"Model: {summary['published']}"))
    if summary["exit_code"]:
        lines.append(Text(f"Exit code {summary['exit_code']}: {' '.join(summary['reasons'])}", "red"))
    return lines


def _time(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
