"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.plan.stages import Plan, Stage

_GIB = 2**30
_HEAD = ("stage", "state", "rows", "tokens", "memory/process", "placement", "time", "hours", "cost")


def lines(plan: Plan) -> Iterator[str]:
    """The table, and below it what each number is made of."""
    about = "" if plan.counts.exact else "~"
    rows = [_HEAD, *(_row(plan, stage, about) for stage in plan.stages), _total(plan)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    counts = plan.counts
    yield (
        f"rows and tokens: {counts.how}: {about}{counts.train.pairs:.0f} pairs to train on, "
        f"{about}{counts.held_out.pairs:.0f} held out"
    )
    unit = "GPU hours" if any(stage.gpus for stage in plan.stages) else "hours of processes, for no GPU is used"
    yield f"hours: {unit}; of stages without GPUs, of their processes" if "GPU" in unit[:3] else f"hours: {unit}"
    for stage in plan.stages:
        yield f"{stage.name}, time: {stage.why}"
        if stage.memory is not None:
            yield f"{stage.name}, memory: {stage.memory.parts}"
    yield from _fits(plan)


def _fits(plan: Plan) -> Iterator[str]:
    train = next((stage.memory for stage in plan.stages if stage.name == "train"), None)
    for stage in plan.lacking:
        assert stage.memory is not None
        yield f"{stage.name} does not fit: {stage.memory.lacking}"
        if stage.memory.knob is not None:
            yield f"{stage.name} fits with: {stage.memory.knob}"
        else:
            yield f"{stage.name}: no single setting makes it fit; use workers with more memory, or a smaller model"
    if plan.lacking or train is None:
        return
    if train.has is None:
        yield "fits: unknown, for the memory of a worker is; say --memory-gib (of a GPU, or of a worker on CPUs)"
    else:
        yield f"fits: train needs about {train.bytes / _GIB:.1f} of {train.has / _GIB:.1f} GiB"


def _row(plan: Plan, stage: Stage, about: str) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{about}{_large(value)}"

    cost = plan.cost(stage)
    return (
        stage.name,
        stage.state,
        number(stage.rows),
        number(stage.tokens),
        "" if stage.memory is None else f"{stage.memory.bytes / _GIB:.2f} GiB",
        stage.placement,
        "?" if stage.seconds is None else _long(stage.seconds),
        "?" if stage.hours is None else f"{stage.hours:.2f}",
        "" if plan.price is None else "?" if cost is None else f"{cost:.2f}",
    )


def _total(plan: Plan) -> tuple[str, ...]:
    known = [stage for stage in plan.stages if stage.seconds is not None]
    more = "" if len(known) == len(plan.stages) else " + ?"
    seconds = sum(stage.seconds or 0.0 for stage in known)
    hours = sum(stage.hours or 0.0 for stage in known)
    cost = "" if plan.price is None else f"{plan.price * hours:.2f}{more}"
    return ("all", "", "", "", "", "", f"{_long(seconds)}{more}", f"{hours:.2f}{more}", cost)


def _large(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.0f}"


def _long(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
