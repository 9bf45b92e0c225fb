"""Which period and which partitions a file belongs to, as its path tells.

A date is that of a Hive-style folder (date=2026-11-01, or year=2026/month=11/day=01), or else that in the name, or
else that of the innermost folder that is called by a date alone. Written 2026-11-01, 2026_11_01 or 20261101.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import date

from dpo_ray.errors import DataError

_DATE = re.compile(r"(?<!\d)(\d{4})([-_]?)(\d{2})\2(\d{2})(?!\d)")


def partitions_of(uri: str) -> dict[str, str]:
    """Key → value of the Hive-style folders on the way to a file, such as date → 2026-11-01."""
    pairs = (part.partition("=") for part in uri.split("/")[:-1])
    return {key: value for key, equals, value in pairs if key and equals and value}


def date_of(uri: str) -> date | None:
    """The day that a file is of; None where its path tells none. Raises DataError where its name tells several."""
    *folders, name = uri.split("/")
    partitions = partitions_of(uri)
    whole = [found for value in partitions.values() if (found := _alone(value)) is not None]
    if whole:
        return whole[-1]
    if {"year", "month", "day"} <= partitions.keys():
        return _day(*(partitions[key] for key in ("year", "month", "day")))
    in_name = {found for match in _DATE.finditer(name) if (found := _day(match[1], match[3], match[4])) is not None}
    if len(in_name) > 1:
        raise DataError(
            f"{uri} has several dates in its name ({', '.join(map(str, sorted(in_name)))}), so that it cannot be told "
            "whether data.since and data.until mean it. Name it by one, or put it below a folder such as "
            "date=2026-11-01."
        )
    named = (_alone(folder) for folder in reversed(folders))
    return next(iter(in_name), None) or next((found for found in named if found is not None), None)


def in_period(files: Sequence[str], since: date | None, until: date | None) -> list[str]:
    """The files of the days from `since` to `until`, both included; None: without an end.

    Raises DataError where a file tells no date, and where none is of these days.
    """
    days = {file: date_of(file) for file in files}
    if undated := [file for file, day in days.items() if day is None]:
        raise DataError(
            f"{len(undated)} of the {len(files)} files of data.train tell no date, the first being {undated[0]}, so "
            "that data.since and data.until cannot choose among them. Put a date into their names or folders "
            "(2026-11-01.parquet, date=2026-11-01/…), or name the files of the period in data.train."
        )
    known = {file: day for file, day in days.items() if day is not None}
    found = [file for file, day in known.items() if (since or day) <= day <= (until or day)]
    if not found:
        asked = f"{since or 'the first day'} to {until or 'the last one'}"
        raise DataError(
            f"None of the {len(files)} files of data.train is of the period from {asked} (data.since, data.until): "
            f"they are of {min(known.values())} to {max(known.values())}. Nothing was done; name a period that has "
            "files."
        )
    return found


def in_partitions(files: Sequence[str], wanted: Iterable[str]) -> list[str]:
    """The files in these partitions, written key=value: of several with the same key in any, of other keys in each.

    Raises DataError where a partition has no file, or all of them together have none.
    """
    asked: dict[str, set[str]] = {}
    there = {(key, value) for file in files for key, value in partitions_of(file).items()}
    for partition in wanted:
        key, _, value = partition.partition("=")
        if (key, value) not in there:
            same = sorted(v for k, v in there if k == key)
            has = f"of {key} there are {same[0]} to {same[-1]}" if same else f"no folder is called {key}=…"
            raise DataError(
                f"None of the {len(files)} files of data.train is in the partition {partition} (data.partitions): "
                f"{has}. Nothing was done; name partitions that have files."
            )
        asked.setdefault(key, set()).add(value)
    found = [file for file in files if all(partitions_of(file).get(key) in values for key, values in asked.items())]
    if not found:
        raise DataError(
            f"None of the {len(files)} files of data.train is in all of {', '.join(wanted)} (data.partitions): of "
            "different keys each must hold. Nothing was done; name partitions that share files."
        )
    return found


def _alone(text: str) -> date | None:
    match = _DATE.fullmatch(text)
    return _day(match[1], match[3], match[4]) if match else None


def _day(year: str, month: str, day: str) -> date | None:
    try:
        return date(int(year), int(month), int(day))
    except ValueError:  # digits of something else
        return None
