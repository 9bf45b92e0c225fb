"""Which data a run has read: files, days, and what the published model has not been trained on yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import date, timedelta
from typing import Any

from dpo_ray.config import Data
from dpo_ray.data.raw.partitions import date_of
from dpo_ray.errors import DataError
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.lineage import SourceFile, read_policy
from dpo_ray.storage.published import latest, published_folder
from pipelines.context import RunContext

_STAGE = "ingest"
_LISTED = 10


def tell_input(context: RunContext, pairs: Artifact) -> dict[str, Any]:
    """Say which data the pairs were read from; and tell it, as `input` of the summary.

    A file is new where the published model was made with none of its content, whatever it was called.
    """
    data = context.config.data
    folder = published_folder(context.output, context.config.run.name)
    standing = latest(folder)
    record = read_policy(context.output, standing.version) if standing is not None else None
    known = {file.sha256 for file in record.sources} if record is not None else set()
    rows: Counter[SourceFile] = Counter()
    for shard in pairs.manifest.files:
        if shard.rows is not None:
            rows[context.sources[shard.name.rpartition("/")[2]]] += shard.counters["read"]
    new = [file for file in rows if file.sha256 not in known]
    new_rows = sum(rows[file] for file in new)
    chosen = ", ".join(f"{name}={value}" for name, value in data.chooses_files.items())
    of_those = f" ({chosen})" if chosen else ""
    say(_STAGE, f"{rows.total()} rows in {len(rows)} files{of_those}, new: {new_rows} in {len(new)}")
    days = _by_day(rows)
    if missing := _missing(data, days):
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        say(_STAGE, f"no file is of {', '.join(map(str, missing[:_LISTED]))}{more}, days of the period")
    return {
        "files": len(rows),
        "rows": rows.total(),
        "new_files": len(new),
        "new_rows": new_rows,
        "compared_with": record.policy if record is not None else None,
        "chosen_by": data.chooses_files,
        "days": days,
    }


def _by_day(rows: Counter[SourceFile]) -> dict[str, dict[str, int]]:
    """Day → the files of it and their rows, for those of data.train whose paths tell a day."""
    found: dict[str, dict[str, int]] = {}
    for file, count in rows.items():
        try:
            day = date_of(file.uri) if file.key.startswith("data.train") else None
        except DataError:  # it names several, and nobody has asked for one
            continue
        if day is not None:
            entry = found.setdefault(day.isoformat(), {"files": 0, "rows": 0})
            entry["files"] += 1
            entry["rows"] += count
    return dict(sorted(found.items()))


def _missing(data: Data, days: Iterable[str]) -> list[date]:
    """Days of the period, where it has two ends, that no file with rows is of."""
    if data.since is None or data.until is None:
        return []
    there = set(days)
    period = (data.since + timedelta(days=n) for n in range((data.until - data.since).days + 1))
    return [day for day in period if day.isoformat() not in there]
