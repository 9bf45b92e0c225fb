"""Benchmark tasks of base and tuned model beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
"""As TASK_MEASURES has it."""


def beside(base: Iterable[Row], tuned: Iterable[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each metric of a task its figures of both models, in the order of the names that were asked for.

    Each side has `value`, `stderr` and `n`, null and 0 where only the other model has the metric: a task may leave a
    metric out where no answer of a model can be measured by it.
    """
    sides = {side: {_key(row): row for row in rows} for side, rows in (("base", base), ("tuned", tuned))}
    found = {key: row for of_side in sides.values() for key, row in of_side.items()}
    of_one = sorted(found, key=lambda key: names.index(key[0]))
    return [
        {
            "task": found[key]["task"],
            "num_fewshot": found[key]["num_fewshot"],
            "metric": found[key]["metric"],
            "higher_is_better": found[key]["higher_is_better"],
            **{side: _figures(of_side.get(key)) for side, of_side in sides.items()},
        }
        for key in of_one
    ]


def _key(row: Row) -> tuple[str, str, str]:
    return row["asked"], row["task"], row["metric"]


def _figures(row: Row | None) -> dict[str, Any]:
    if row is None:
        return {"value": None, "stderr": None, "n": 0}
    return {name: row[name] for name in ("value", "stderr", "n")}


def task_line(row: Row) -> str:
    """A row of `beside` as a line: before and after, each with its standard error."""
    base, tuned = with_stderr(row["base"]), with_stderr(row["tuned"])
    return f"{row['task']}, {row['metric']}: base {base}, tuned {tuned} (± standard error, n={documents(row)})"


def with_stderr(side: Mapping[str, Any]) -> str:
    """The figure of one side with its standard error."""
    if side["value"] is None:
        return "none"
    return f"{side['value']:.4f}" + (f" ± {side['stderr']:.4f}" if side["stderr"] is not None else "")


def documents(row: Row) -> str:
    """How many documents both sides were measured on, or each of them where that differs."""
    return " and ".join(dict.fromkeys(str(row[side]["n"]) for side in ("base", "tuned")))
