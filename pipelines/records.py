"""What a person is told, for programs: one JSON object a line, each with the same keys.

{"time": …, "level": "info" | "warning" | "error", "run": …, "stage": …, "shard": …, "node": …, "message": …}

`time` is in UTC, when and where the line was written; `run` the id of the run's folder, null before there is one;
`stage` and `shard` are null for what belongs to none; `node` is the machine, or its pod, that the line comes from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from dpo_ray.progress import node

RECORDS = "log.jsonl"
"""Below the run's folder, where that is no object store's."""

Level = Literal["info", "warning", "error"]


class Records:
    """The records of one run, held until its folder is known and written there from then on."""

    def __init__(self, show: Callable[[str], None] | None = None):
        """show: is given each record at once, as a line."""
        self.run: str | None = None
        self._show = show
        self._early: list[dict[str, Any]] = []
        self._file: FileIO | None = None

    def add(self, message: str, level: Level = "info", **fields: Any) -> None:
        """fields: of those above, where they are known."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        found = {"time": time, "stage": None, "shard": None, "node": node(), **fields}
        record = {
            "time": found["time"],
            "level": level,
            "run": self.run,
            **{key: found[key] for key in ("stage", "shard", "node")},
            "message": message,
        }
        if self._show is not None:
            self._show(_line(record))
        if self._file is None:
            self._early.append(record)
        else:
            self._append([record])

    def keep(self, folder: Path) -> None:
        """From now on they are in this folder, with those that there are already."""
        self._file = FileIO(folder / RECORDS, "a")
        self._append([{**record, "run": self.run} for record in self._early])
        self._early = []

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, records: list[dict[str, Any]]) -> None:
        assert self._file is not None
        # One write: lines of threads stay whole.
        self._file.write("".join(f"{_line(record)}\n" for record in records).encode())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
