"""Published models of one name: versions, which of them is the latest, and the record of how it came to be.

<output>/models/<name>/<version>/        a whole Hugging Face folder; its README.md, written last, completes it
<output>/models/<name>/latest.json       the pointer, moved atomically
<output>/models/<name>/history/*.json    every move of the pointer, oldest first by name; written before the move
"""

from __future__ import annotations

import getpass
import os
import platform
import re
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_ray.errors import ConfigError, DataError
from dpo_ray.storage.location import Location

LATEST = "latest.json"
CARD = "README.md"
_HISTORY = "history"
_STAMP = "%Y%m%dT%H%M%S.%fZ"
_RECORD = re.compile(r"\d{8}T\d{6}\.\d{6}Z-[a-z]+\.json")


class Move(BaseModel):
    """A move of the pointer; latest.json holds the last one."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: str
    path: str
    published: str
    """When the pointer was moved, in UTC."""
    run_id: str | None = None
    """The run that trained the version."""
    data: dict[str, Any] = {}
    """What it was trained on: fingerprints of artifacts."""
    by: str = ""
    """Who moved it: user and machine."""
    action: Literal["publish", "promote", "rollback"] = "publish"
    why: str = ""
    previous: str | None = None
    """The version that was the latest before."""


def published_folder(output: Location, name: str) -> Location:
    """Where the versions of a name lie. Raises ConfigError where it is no name of a folder."""
    if "/" in name or name in {"", ".", ".."}:
        raise ConfigError(f"{name!r} is no name of a published model: give run.name, without a path.")
    return output / "models" / name


def is_complete(version: Location) -> bool:
    """Whether a version is there as a whole."""
    return (version / CARD).exists()


def latest(folder: Location) -> Move | None:
    """What the pointer of a name says; None where nothing was published.

    Raises DataError where it is damaged, or has gone: what would be trained from it, or compared with it, would not be.
    """
    try:
        return Move.model_validate_json((folder / LATEST).read_bytes())
    except FileNotFoundError:
        # One record alone is also what a kill leaves before the first move.
        if len(moved := _records(folder)) > 1:
            raise DataError(
                f"{folder / LATEST} is not there, and {folder / _HISTORY} tells of {len(moved)} moves of it. "
                "`dpo-ray promote` writes it anew, naming one of the versions, which are the folders beside it; to "
                f"begin without any, move {folder} away, or take another run.name."
            ) from None
        return None
    except ValidationError as error:
        raise DataError(
            f"{folder / LATEST} is damaged ({error.error_count()} errors). `dpo-ray promote` writes it anew; the "
            f"versions are the folders of {folder}."
        ) from error


def history(folder: Location) -> list[Move]:
    """Every move of the pointer, oldest first. Raises DataError where the record of one is damaged."""
    return [_recorded(folder, name) for name in _records(folder)]


def last_other(folder: Location, version: str) -> Move | None:
    """The last move to another version than this one, None where there was none; only the moves since then are read.

    Raises DataError where the pointer or one of these is damaged.
    """
    standing = latest(folder)
    if standing is None or standing.version != version:
        return standing
    others = (_recorded(folder, name) for name in reversed(_records(folder)))
    return next((one for one in others if one.version != version), None)


def _recorded(folder: Location, name: str) -> Move:
    place = folder / _HISTORY / name
    try:
        return Move.model_validate_json(place.read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{place} is damaged ({error.error_count()} errors). Take it out of that folder: the versions and the "
            "latest stay as they are, and rollback goes no further back than to the move after it."
        ) from error


def _records(folder: Location) -> list[str]:
    """Names of the records of moves, oldest first; whatever else somebody has put there is none."""
    return sorted(file.name for file in (folder / _HISTORY).children() if _RECORD.fullmatch(file.name))


def moves(folder: Location) -> list[Move]:
    """The moves of the pointer that came about, oldest first: a kill may leave the record of one that did not."""
    now = latest(folder)
    found: list[Move] = []
    previous = now.version if now is not None else None
    for one in reversed(history(folder)):
        # A damaged pointer, which was written anew, says nothing of what was before.
        if previous is None or one.version == previous:
            found.append(one)
            previous = one.previous
    return found[::-1]


def was_latest(folder: Location, version: str) -> bool:
    """Whether the pointer named a version at some time."""
    return any(one.version == version for one in moves(folder))


def compared_version(folder: Location, version: str) -> str | None:
    """Which published version a new one is compared with: the latest, but never itself, as when it is made again.

    Then it is the one that it took the place of when it was published. None where there is none.
    """
    standing = latest(folder)
    if standing is None or standing.version != version:
        return standing.version if standing is not None else None
    made = [one for one in moves(folder) if one.version == version and one.action == "publish"]
    before = [one.previous for one in made if one.previous != version]
    return before[-1] if before and before[-1] is not None and is_complete(folder / before[-1]) else None


def move(
    folder: Location,
    version: str,
    *,
    action: Literal["publish", "promote", "rollback"],
    why: str,
    run_id: str | None = None,
    data: dict[str, Any] | None = None,
) -> Move:
    """Make a version the latest one, and record it.

    Raises ConfigError where the version is not there as a whole.
    """
    # A name of a folder there, and no path that leads out of it.
    if "/" in version or not is_complete(folder / version):
        known = ", ".join(complete_versions(folder)) or "none"
        raise ConfigError(
            f"{folder / version} is no published model. Name one of the versions of {folder.name}: {known}."
        )
    try:
        before = latest(folder)
    except DataError:  # it is written anew, and what it said is lost
        before = None
    now = datetime.now(UTC)
    made = Move(
        version=version,
        path=(folder / version).uri,
        published=now.isoformat(timespec="seconds"),
        run_id=run_id,
        data=data or {},
        by=who(),
        action=action,
        why=why,
        previous=before.version if before is not None else None,
    )
    content = made.model_dump_json(indent=1).encode()
    # A kill between the two leaves a record of a move that did not happen, and never a move without a record.
    (folder / _HISTORY / f"{_stamp(folder, now):{_STAMP}}-{action}.json").write_bytes(content)
    (folder / LATEST).write_bytes(content)
    return made


def _stamp(folder: Location, now: datetime) -> datetime:
    """Of a new record, later than all others: clocks of machines differ, and are set back, and names tell the order."""
    names = _records(folder)
    last = datetime.strptime(names[-1].partition("-")[0], _STAMP).replace(tzinfo=UTC) if names else None
    return now if last is None or last < now else last + timedelta(microseconds=1)


def complete_versions(folder: Location) -> list[str]:
    """Names of the versions that are there as a whole."""
    return sorted(child.name for child in folder.children() if is_complete(child))


def promote(output: Location, name: str, version: str, why: str) -> Move:
    """Make a version of a name the latest one by hand. Raises ConfigError where there is no such version."""
    folder = published_folder(output, name)
    require_any(folder)
    known = [one for one in history(folder) if one.version == version]
    origin = known[-1] if known else None
    run_id, data = (origin.run_id, origin.data) if origin is not None else (None, {})
    return move(folder, version, action="promote", why=why, run_id=run_id, data=data)


def rollback(output: Location, name: str, why: str) -> Move:
    """Make the version the latest one that was so before the present one.

    A second rollback goes one further back, and not to where the first one came from. Raises ConfigError where there is
    none.
    """
    folder = published_folder(output, name)
    require_any(folder)
    now = latest(folder)
    standing: list[Move] = []
    for one in moves(folder):
        if one.action == "rollback":
            while standing and standing[-1].version != one.version:
                standing.pop()
        elif not standing or standing[-1].version != one.version:
            standing.append(one)
    before = [
        one for one in standing if now is not None and one.version != now.version and is_complete(folder / one.version)
    ]
    if not before:
        raise ConfigError(
            f"There is no earlier version of {name} to go back to (versions of {name}: "
            f"{', '.join(complete_versions(folder)) or 'none'}): name one with `dpo-ray promote`."
        )
    target = before[-1]
    return move(folder, target.version, action="rollback", why=why, run_id=target.run_id, data=target.data)


def require_any(folder: Location) -> None:
    """Raises ConfigError where nothing was published under a name."""
    if not complete_versions(folder):
        others = [child.name for child in (Location(folder.uri.rpartition("/")[0])).children()]
        named = f"names there: {', '.join(others)}" if others else "nothing was published there"
        raise ConfigError(
            f"{folder} holds no published model ({named}). Check the folder given as run.output, and the name."
        )


def who() -> str:
    """user@machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = f"user {os.getuid()}"
    return f"{user}@{platform.node()}"
