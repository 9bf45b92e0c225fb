"""The runs of an output folder, newest first: what each read, measured, published and cost.

Only those that are shown are read, however many there are.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dpo_ray.errors import ConfigError, DataError
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import latest

_SIDE_BY_SIDE = 16  # threads; they mostly wait for a disk or an object store
_TIME = re.compile(r"\d{8}T\d{6}Z")
_WIDTH = 160  # of the table where no terminal says how wide it is
_MOST_REASON = 100  # characters of a reason in the table; --json has all


@dataclass(frozen=True)
class Page:
    """The newest runs."""

    runs: list[dict[str, Any]]
    total: int
    """Runs that the folder has."""
    latest: dict[str, str]
    """Name of a published model → its latest version."""
    damaged: list[str]
    """What could not be read, in sentences."""


def page(output: Location, last: int | None) -> Page:
    """The newest runs; last: at most so many, None: all. Raises ConfigError where there is none."""
    names = newest_first(output / "runs")
    if not names:
        raise ConfigError(f"{output} holds no run: name the folder given as run.output, or a folder below its runs/.")
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as threads:
        runs = list(threads.map(lambda name: _run(output / "runs" / name), names[:last]))
    standing: dict[str, str] = {}
    damaged: list[str] = []
    for name in (output / "models").folders():
        try:
            move = latest(output / "models" / name)
        except DataError as error:  # the other names, and the runs, are to be seen all the same
            damaged.append(str(error))
            continue
        if move is not None:
            standing[name] = move.version
    return Page(runs, len(names), standing, damaged)


def newest_first(folder: Location) -> list[str]:
    """Names of runs, by the time in them; of others by when something was last written there."""
    times: dict[str, float] = {}
    untimed = []
    for name, at in folder.folders().items():
        if (began := _began(name)) is not None:
            times[name] = began
        elif at is not None:
            times[name] = at
        else:
            untimed.append(name)  # a folder of an object store has no time of its own
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as threads:
        written = threads.map(lambda name: (folder / name / "config.yaml").written(), untimed)
        times |= {name: when or 0.0 for name, when in zip(untimed, written, strict=True)}
    return sorted(times, key=lambda name: (-times[name], name))


def _began(name: str) -> float | None:
    """In seconds since the epoch, where the name of a run tells."""
    try:
        found = _TIME.findall(name)
        return datetime.strptime(found[-1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp() if found else None
    except ValueError:  # digits of something else
        return None


def _run(folder: Location) -> dict[str, Any]:
    """What is told of a run."""
    try:
        return _told(folder.name, json.loads((folder / "summary.json").read_bytes()))
    except FileNotFoundError:
        return {"run_id": folder.name, "outcome": "unfinished", "exit_code": None}
    except (ValueError, LookupError, TypeError, AttributeError):  # of one run, which is to hide no other
        reason = f"{folder / 'summary.json'} cannot be read"
        return {"run_id": folder.name, "outcome": "damaged", "exit_code": None, "reasons": [reason]}


def _told(run_id: str, summary: dict[str, Any]) -> dict[str, Any]:
    evaluation = summary.get("eval") or {}
    return {
        "run_id": run_id,
        "outcome": outcome_of(summary),
        "exit_code": summary["exit_code"],
        "began": summary.get("began"),
        "input": summary.get("input"),
        "dropped": _dropped(summary["stages"]),
        "accuracy": evaluation.get("accuracy"),
        "win_rate": evaluation.get("win_rate"),
        "published": summary["published"],
        "nothing_new": summary.get("nothing_new"),
        "reasons": summary["reasons"],
        "cost": summary.get("cost"),
    }


def outcome_of(summary: dict[str, Any]) -> str:
    """How a run has ended, in a word or two. summary: as summary.json has it."""
    if summary.get("nothing_new"):
        return "nothing new"
    if summary["published"]:
        return "published"
    outcomes = {0: "done", 4: "not published", 75: "busy", 130: "interrupted", 143: "terminated"}
    return outcomes.get(summary["exit_code"], "failed")


def _dropped(stages: dict[str, Any]) -> dict[str, int]:
    """Reason → rows, of the run's own data."""
    # Tokenizing counts again what `duplicates` finds.
    dropped: Counter[str] = Counter()
    for name in ("ingest", "generate", "pair", "tokenize", "reference", "mismatched"):
        dropped.update((stages.get(name) or {}).get("rows", {}).get("dropped", {}))
    return dict(dropped)


def lines(found: Page, *, as_json: bool = False) -> Iterator[str]:
    """What a person, or a program, is told."""
    if as_json:
        told = {"total": found.total, "runs": found.runs, "latest": found.latest, "damaged": found.damaged}
        yield json.dumps(told, indent=1)
        return
    yield from _table(found.runs)
    if len(found.runs) < found.total:
        yield f"The newest {len(found.runs)} of {found.total} runs; --last N or --all shows more."
    for name, version in found.latest.items():
        yield f"{name}: latest is {version}"
    yield from found.damaged


def _table(runs: list[dict[str, Any]]) -> Iterator[str]:
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "rows", "dropped", "accuracy", "win rate", "outcome", "cost", show_lines=True)
    for run in runs:
        table.add_row(
            run["run_id"],
            _rows(run.get("input")),
            "\n".join(f"{rows} {reason}" for reason, rows in (run.get("dropped") or {}).items()),
            _estimate(run.get("accuracy")),
            _estimate(run.get("win_rate")),
            _told_outcome(run),
            _cost(run.get("cost")),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, _WIDTH))
    with console.capture() as capture:
        console.print(table)
    yield capture.get().rstrip("\n")


def _rows(read: dict[str, Any] | None) -> str:
    if read is None:
        return ""
    days = list(read["days"])
    of = f"\n{days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "") if days else ""
    return f"{read['rows']} in {read['files']} files{of}\nnew: {read['new_rows']} in {read['new_files']}"


def _told_outcome(run: dict[str, Any]) -> str:
    if run["outcome"] in {"published", "nothing new"}:
        version = run["nothing_new"]["version"] if run["nothing_new"] else run["published"].rpartition("/")[2]
        return f"{run['outcome']}: {version}"
    code = "" if run["exit_code"] in {None, 0} else f" (exit code {run['exit_code']})"
    reason = " ".join(run.get("reasons") or [])
    reason = f"{reason[:_MOST_REASON]}…" if len(reason) > _MOST_REASON else reason
    return f"{run['outcome']}{code}" + (f": {reason}" if reason else "")


def _estimate(found: dict[str, Any] | None) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else ""


def _cost(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    gpus = f"\n{found['gpu_hours']:.3g} GPU-hours" if found["gpu_hours"] else ""
    return f"{found['hours']:.3g} h\n{found['worker_hours']:.3g} worker-hours{gpus}"
