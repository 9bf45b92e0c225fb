"""What came of each fault, kept from one session to the next, and the table of all of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from dpo_ray.storage.location import Location
from tests.chaos.job import Job, differences, state

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".chaos"
TABLE = ROOT / "benchmarks" / "chaos.md"
SOURCES = ("dpo_ray", "pipelines", "tests/chaos/job.py")
"""What the run under test is made of."""


def folder() -> Path:
    """Of the undisturbed run and of the cells, for the code as it is now."""
    files = [f for name in SOURCES for f in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*"))]
    hashed = hashlib.sha256()
    for file in sorted(f for f in files if f.is_file() and "__pycache__" not in f.parts):
        hashed.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return KEPT / hashed.hexdigest()[:16]


@dataclass
class Cell:
    """One fault in one stage."""

    fault: str
    """In words."""
    stage: str
    test: str
    """By which it is made again."""
    recovered: str = ""
    """How: by itself, or by what a person or a schedule has to do."""
    rows_again: int = 0
    """Rows of shards that were begun again."""
    steps_again: int = 0
    seconds_lost: float | None = None
    """From the fault, or its end, to the first new work: Trace.new_work_after."""
    seconds_away: float = 0.0
    """How long the fault itself lasted, which is not counted as lost."""
    failed: str | None = None
    """Why the end is another one than the undisturbed run's, or there is none."""
    made: str = ""
    commit: str = ""
    struck_at: float | None = field(default=None, repr=False)
    over_at: float | None = field(default=None, repr=False)

    def strikes(self) -> None:
        """The fault comes now."""
        self.struck_at = self.over_at = time.monotonic()

    def is_over(self) -> None:
        """It has lasted until now."""
        assert self.struck_at is not None
        self.over_at = time.monotonic()
        self.seconds_away = round(self.over_at - self.struck_at, 1)

    def ends_as(self, undisturbed: Path, job: Job, recovered: str) -> None:
        """Take the measures of a run that came to its end, and require that this is the undisturbed run's."""
        ended = time.monotonic()
        assert self.struck_at is not None and self.over_at is not None, "no fault came"
        self.recovered = recovered
        rows = job.rows()
        for (what, name), times in job.trace.again().items():
            if what == "step":
                self.steps_again += times
            else:
                self.rows_again += times * rows[name]
        new = job.trace.new_work_after(self.struck_at)
        self.seconds_lost = round(max(0.0, (new or ended) - self.over_at), 1)
        found = differences(state(job.output), state(Location.of(undisturbed)))
        assert not found, "\n".join(found)

    def keep(self, folder: Path) -> None:
        self.made = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
        self.commit = _commit()
        kept = dataclasses.asdict(self)
        del kept["struck_at"], kept["over_at"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.test}.json").write_text(json.dumps(kept, indent=1))


def _commit() -> str:
    from benchmarks.record import environment

    return str(environment(())["commit"])


def kept_cells(folder: Path) -> list[Cell]:
    """In the order of their tests."""
    return [Cell(**json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))]


def rows_of(cells: list[Cell]) -> list[list[str]]:
    """Of the table, its head first."""
    head = [
        "fault",
        "stage",
        "end state",
        "recovered",
        "rows again",
        "steps again",
        "s away",
        "s lost",
        "make chaos FAULTS=",
    ]
    rows = [head]
    for cell in cells:
        same = "equal" if cell.failed is None else "**not reached**"
        lost = f"{cell.seconds_lost:.1f}" if cell.seconds_lost is not None else "–"
        how = cell.recovered if cell.failed is None else f"**no**: {_short(cell.failed)}"
        rows.append(
            [
                cell.fault,
                cell.stage,
                same,
                how,
                str(cell.rows_again),
                str(cell.steps_again),
                f"{cell.seconds_away:.1f}" if cell.seconds_away else "–",
                lost,
                cell.test.removeprefix("test_"),
            ]
        )
    return rows


def _short(text: str) -> str:
    line = " ".join(text.split())
    return (line if len(line) <= 200 else f"{line[:199]}…").replace("|", "/")


def written(cells: list[Cell]) -> str:
    """The dated table with what it was measured on."""
    from benchmarks.record import environment, table, versions

    on = environment(("ray", "torch", "transformers", "pyarrow", "moto"))
    head, *rows = rows_of(cells)
    recovered = sum(cell.failed is None for cell in cells)
    commits = ", ".join(dict.fromkeys(cell.commit for cell in cells))
    days = sorted({cell.made[:10] for cell in cells})
    return (
        f"## {' to '.join(dict.fromkeys([days[0], days[-1]]))} (commit {commits})\n\n"
        f"{on['hardware']}; {os.cpu_count()} cores; {versions(on)}. Load when this was written: "
        f"{os.getloadavg()[2]:.1f} over 15 minutes.\n\n"
        f"{recovered} of {len(cells)} recovered with the end state of the undisturbed run.\n\n"
        f"{table(head, rows)}\n"
    )
