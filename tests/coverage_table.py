"""What all processes of the tests have run, as tests/every_process has it measured: a line for each room."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

from coverage import Coverage

ROOT = Path(__file__).parents[1]
ELSEWHERE = ROOT / "cluster" / "orchestrators"  # runs in other environments
CONFIG = str(ROOT / "pyproject.toml")


def begin(data: Path) -> None:
    """Forget an earlier run; nothing else that lies there."""
    data.parent.mkdir(parents=True, exist_ok=True)
    for earlier in data.parent.glob(f"{data.name}.*"):
        earlier.unlink()


def table(data: Path) -> list[str]:
    """A line for each folder of the packages. Writes `.coverage`, from which `coverage html` tells the lines."""
    coverage = Coverage(data_file=str(ROOT / ".coverage"), config_file=CONFIG)
    coverage.combine([str(data.parent)], keep=True)  # those that are called as .coverage is
    coverage.save()
    lines: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for package in _packages():
        for source in sorted((ROOT / package).rglob("*.py")):
            if ELSEWHERE in source.parents:
                continue
            _, statements, _, missing, _ = coverage.analysis2(str(source))
            for folder in (str(source.parent.relative_to(ROOT)), "all"):
                lines[folder] += len(statements)
                missed[folder] += len(missing)
    return [
        f"{folder:<24}{total:>8} lines {missed[folder]:>6} missed {1 - missed[folder] / total:>8.1%}"
        for folder, total in sorted(lines.items(), key=lambda item: (item[0] == "all", item[0]))
        if total
    ]


def _packages() -> list[str]:
    return tomllib.loads(Path(CONFIG).read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
