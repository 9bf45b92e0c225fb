"""The marks of tests/line_coverage as coverage's data, and what they say of each room."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from coverage import Coverage, CoverageData

from tests.line_coverage.covered_lines import PACKAGES, ROOT, lines_run


def begin(folder: Path) -> None:
    """Forget an earlier run's marks."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def table() -> list[str]:
    """A line for each folder of the packages. Writes `.coverage`, from which `coverage html` tells the lines."""
    sources = [source for package in PACKAGES for source in sorted((ROOT / package).rglob("*.py"))]
    data = CoverageData(str(ROOT / ".coverage"))
    data.erase()
    data.add_lines({str(source): lines_run(source) for source in sources})
    data.write()
    coverage = Coverage(data_file=str(ROOT / ".coverage"), config_file=str(ROOT / "pyproject.toml"))
    coverage.load()
    lines: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for source in sources:
        _, statements, _, missing, _ = coverage.analysis2(str(source))
        for folder in (str(source.parent.relative_to(ROOT)), "all"):
            lines[folder] += len(statements)
            missed[folder] += len(missing)
    return [
        f"{folder:<24}{total:>8} lines {missed[folder]:>6} missed {1 - missed[folder] / total:>8.1%}"
        for folder, total in sorted(lines.items(), key=lambda item: (item[0] == "all", item[0]))
        if total
    ]
