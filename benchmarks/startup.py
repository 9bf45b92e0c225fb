"""What a command costs before and after its work: wall time until it ends, and CPU time of it and all that it starts.

    python -m benchmarks.startup --data <folder with few rows> [--before <another checkout>] [--demo] [--write]

runs each command several times, with --before from both checkouts by turns, and prints the medians as a table; --write
puts it at the end of benchmarks/startup.md. --demo makes the demo's main job once in each (minutes), to time its second
run. The machine should be quiet: what a start waits for is mostly its own processes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.record import OUR_PACKAGES, ROOT, environment, table, versions

_PR_SET_CHILD_SUBREAPER = 36
_CONFIG = "pipelines/configs/align_cpu.yaml"
_DEMO = "pipelines/configs/demo_cpu.yaml"


@dataclass(frozen=True)
class Command:
    """A command line of dpo-ray. {data} and {out} stand for folders, {fresh} for one that is empty each time."""

    name: str
    arguments: tuple[str, ...]
    code: int = 0


COMMANDS = [
    Command("help", ("--help",)),
    Command("an unknown key", ("run", _CONFIG, "-o", "train.no_such_key=1"), 2),
    Command("dry run", ("run", _CONFIG, "--dry-run")),
    Command("a wrong path", ("run", _CONFIG, "-o", "data.train={fresh}/*.parquet", "-o", "run.output={fresh}/out"), 3),
    Command(
        "a wrong layout",
        ("run", _CONFIG, "-o", "data.train={data}", "-o", "data.layout=ranked", "-o", "run.output={fresh}"),
        3,
    ),
    Command("ingest", ("ingest", _CONFIG, "-o", "data.train={data}", "-o", "run.output={fresh}")),
    Command("ingest, reused", ("ingest", _CONFIG, "-o", "data.train={data}", "-o", "run.output={out}")),
    Command("show", ("show", "{out}")),
]
DEMO = Command("the demo, reused", ("run", _DEMO, "-o", "run.output={demo}"))


def adopt_orphans() -> None:
    """Processes whose parent ends become this one's children, so that their CPU time is counted here."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def measure(command: list[str], *, cwd: Path, code: int) -> tuple[float, float]:
    """Seconds until a command ends, and CPU seconds of it and of all that it started, once the last has ended.

    Raises SystemExit where it ends with another exit code.
    """
    before = cpu_of_children()
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=cwd, stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": str(cwd)}
        )
        found = process.wait()
        wall = time.monotonic() - began
        if found != code:
            said.seek(0)
            sys.exit(f"{' '.join(command)} ended with {found}, not {code}:\n{said.read().decode()[-2000:]}")
    wait_for_orphans()
    return wall, cpu_of_children() - before


def wait_for_orphans() -> None:
    """Until the last of the processes has ended that were adopted."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def cpu_of_children() -> float:
    """CPU seconds of all that this process has started, and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(command: Command, side: Path, places: dict[str, Path]) -> tuple[float, float]:
    """Wall and CPU seconds of a command of one checkout."""
    with tempfile.TemporaryDirectory(prefix="dpo-ray-startup-") as fresh:
        words = [word.format(**places, fresh=fresh) for word in command.arguments]
        program = "from pipelines.cli import main; main()"
        return measure([sys.executable, "-c", program, *words], cwd=side, code=command.code)


def rows_of(
    commands: list[Command], sides: dict[str, Path], places: dict[str, dict[str, Path]], runs: int
) -> list[list[str]]:
    """Of each command a row: medians of wall and CPU seconds for each side, and the extremes of the wall."""
    rows = []
    for command in commands:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(runs):
            for name, side in sides.items():  # by turns, so that a slow minute is both sides'
                found[name].append(run(command, side, places[name]))
        row = [command.name]
        for measured in found.values():
            wall, cpu = ([m[i] for m in measured] for i in (0, 1))
            row += [f"{statistics.median(wall):.2f} ({min(wall):.2f}–{max(wall):.2f})", f"{statistics.median(cpu):.2f}"]
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of preference pairs, some 1000 rows")
    parser.add_argument("--before", type=Path, help="another checkout, to be measured beside this one")
    parser.add_argument("--runs", type=int, default=5, help="of each command")
    parser.add_argument("--only", nargs="+", help="names of the commands to run")
    parser.add_argument("--demo", action="store_true", help="the demo's second run too")
    parser.add_argument("--write", action="store_true", help="put the table at the end of benchmarks/startup.md")
    arguments = parser.parse_args()
    adopt_orphans()
    sides = {"before": arguments.before.resolve()} if arguments.before else {}
    sides["now"] = ROOT
    commands = [c for c in COMMANDS if arguments.only is None or c.name in arguments.only]
    scratch = Path(tempfile.mkdtemp(prefix="dpo-ray-startup-"))
    places: dict[str, dict[str, Path]] = {}
    for name, side in sides.items():
        places[name] = {"data": arguments.data.resolve(), "out": scratch / name, "demo": scratch / f"demo-{name}"}
        run(next(c for c in COMMANDS if c.name == "ingest, reused"), side, places[name])
        if arguments.demo:
            run(DEMO, side, places[name])
    head = ["command", *(f"{name}, {what}" for name in sides for what in ("wall s", "CPU s"))]
    rows = rows_of([*commands, *([DEMO] if arguments.demo else [])], sides, places, arguments.runs)
    shutil.rmtree(scratch)
    made = environment((*OUR_PACKAGES, "ray", "typer", "pydantic"))
    text = (
        f"## {datetime.now(UTC):%Y-%m-%d} (commit {made['commit']})\n\n"
        f"{os.cpu_count()} cores, {made['hardware']}; {versions(made)}. Medians of {arguments.runs} runs, and the "
        f"shortest and the longest wall time; load {os.getloadavg()[2]:.1f} over the last 15 minutes.\n\n"
        f"{table(head, rows)}\n"
    )
    print(text)
    if arguments.write:
        report = ROOT / "benchmarks" / "startup.md"
        report.write_text(f"{report.read_text().rstrip()}\n\n{text}")


if __name__ == "__main__":
    main()
