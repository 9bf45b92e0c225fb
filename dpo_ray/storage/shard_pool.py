"""The pool of shards of a kind of artifact: each is written once, and every manifest that needs it points to it.

<output>/artifacts/<kind>/shards/<task>-<content>.parquet               a shard
<output>/artifacts/<kind>/shards/quarantine/<task>-<content>.parquet    the rows that it lacks, with their reasons

<task> is a digest of all that the shard is made from, so that the names tell which tasks are finished. <content> is a
digest of its bytes and its quarantine's: not every engine gives the same numbers twice, and two runs at once may make
the same task with different bytes. Neither replaces what the other's manifest has the hash of; and a file that does not
fit its name, or a shard without its quarantine, is known for what it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from dpo_ray.errors import DataError
from dpo_ray.storage.artifact import (
    MANIFEST,
    POOL,
    QUARANTINE,
    FileEntry,
    Manifest,
    encoded,
    entry_of,
    inspect_shard,
    read_shard,
)
from dpo_ray.storage.location import Location

_DIGITS = 16
_NAME = re.compile(rf"[^-]+-([0-9a-f]{{{_DIGITS}}})\.parquet")


class Finished(BaseModel):
    """A shard that is whole, and its quarantine where it lacks rows, as a manifest has them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: FileEntry
    quarantine: FileEntry | None = None

    @property
    def task(self) -> str:
        return task_of(self.shard.name)

    @property
    def entries(self) -> tuple[FileEntry, ...]:
        return (self.shard, *([self.quarantine] if self.quarantine else []))

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its files."""
        return tuple(entry.name for entry in self.entries)


@dataclass(frozen=True)
class Present:
    """What one listing of a kind's folder shows."""

    files: Mapping[str, int]
    """Of the pool, as manifests name them → bytes."""
    by_task: dict[str, list[str]]
    """Task → names of its shards, in order."""
    manifests: list[Location]
    """Folders of finished artifacts, the newest first."""
    beside: dict[str, list[Location]]
    """Name of an artifact's folder → all that lies in it."""

    def holds(self, finished: Finished) -> bool:
        """Whether all its files are there, in their size."""
        return all(self.files.get(entry.name) == entry.bytes for entry in finished.entries)


@dataclass(frozen=True)
class ShardPool:
    """The pool of a kind."""

    folder: Location
    """Of the kind: <output>/artifacts/<kind>."""

    def write(
        self, task: str, table: pa.Table, counters: dict[str, int], quarantine: pa.Table | None = None
    ) -> Finished:
        """Write a task's shard; it appears when its quarantine is there."""
        data = encoded(table, counters)
        sets_aside = encoded(quarantine, {}) if quarantine is not None else None
        name = f"{task}-{_content(data, sets_aside)}.parquet"
        entry = None
        if sets_aside is not None:
            entry = entry_of(_quarantine_of(f"{POOL}/{name}"), sets_aside)
            (self.folder / entry.name).write_bytes(sets_aside)
        (self.folder / POOL / name).write_bytes(data)
        shard = entry_of(f"{POOL}/{name}", data, table.num_rows, counters)
        return Finished(shard=shard, quarantine=entry)

    def inspect(self, name: str, has_quarantine: bool) -> Finished | None:
        """What a shard is that no manifest tells of; None where it is damaged, or its quarantine is not there.

        Args:
            name: as manifests have it.
            has_quarantine: whether a quarantine of its name is there.
        """
        entry = None
        try:
            shard = inspect_shard(self.folder / name)
            if has_quarantine:
                entry = entry_of(_quarantine_of(name), (self.folder / _quarantine_of(name)).read_bytes())
        except (DataError, FileNotFoundError):  # it is made again
            return None
        if not name.endswith(f"-{_content_of(shard.sha256, entry.sha256 if entry else None)}.parquet"):
            return None
        return Finished(shard=shard.model_copy(update={"name": name}), quarantine=entry)

    def present(self) -> Present:
        """What is there, in one listing."""
        by_task: dict[str, list[str]] = {}
        files: dict[str, int] = {}
        manifests: list[tuple[int, Location]] = []
        beside: dict[str, list[Location]] = {}
        for info in self.folder.files():
            place = self.folder.same_store(info.path)
            name = place.uri.removeprefix(f"{self.folder.uri}/")
            folder, _, rest = name.partition("/")
            if rest.rpartition("/")[2].startswith("."):  # it is being written
                continue
            if folder != POOL:
                beside.setdefault(folder, []).append(place)
                if rest == MANIFEST:
                    manifests.append((info.mtime_ns or 0, place.parent))
                continue
            files[name] = info.size or 0
            if "/" not in rest:
                by_task.setdefault(task_of(name), []).append(name)
        newest = [place for _, place in sorted(manifests, key=lambda found: (-found[0], found[1].uri))]
        return Present(files, {task: sorted(names) for task, names in by_task.items()}, newest, beside)


def task_of(name: str) -> str:
    """The task of a shard or of a quarantine, by its name."""
    return name.rpartition("/")[2].partition("-")[0]


def has_quarantine(name: str, files: Collection[str]) -> bool:
    """Whether the quarantine of a shard is among these files."""
    return _quarantine_of(name) in files


def finished_in(manifest: Manifest) -> list[Finished]:
    """The shards of a manifest that lie in the pool."""
    entries = {entry.name: entry for entry in manifest.files}
    return [
        Finished(shard=entry, quarantine=entries.get(_quarantine_of(entry.name)))
        for entry in manifest.files
        if entry.rows is not None and entry.name.startswith(f"{POOL}/")
    ]


def read_whole_shard(shard: Location) -> pa.Table:
    """All of a shard. One of a pool is known by its bytes: whoever computes with what is in it reads it by this.

    Raises DataError where it is not there, or where its bytes are not those that its name tells. Then it is removed,
    with its quarantine, so that the stage that made it makes it again.
    """
    told = _NAME.fullmatch(shard.name)
    if shard.parent.name != POOL or told is None:
        return read_shard(shard)
    try:
        # What came wrong from a network or a memory may come right the second time: only what lies there is removed.
        data = next((data for data in (shard.read_bytes() for _ in range(2)) if _is_told(data, shard, told[1])), None)
    except FileNotFoundError as error:
        raise DataError(
            f"{shard} is not there any more: it was lost, or was damaged and removed. The same command makes it again."
        ) from error
    if data is None:
        for place in (shard, _beside(shard)):
            place.remove()
        raise DataError(
            f"{shard} was damaged: its bytes were not those that its name tells. It has been removed, and the same "
            "command makes it again. A disk, a memory or a copy that changes bytes will do so again: look for it."
        )
    return pq.read_table(pa.BufferReader(data))


def _is_told(data: bytes, shard: Location, content: str) -> bool:
    """Whether these are the bytes that the name of a shard tells."""
    of_shard = hashlib.sha256(data).hexdigest()
    if _content_of(of_shard, None) == content:
        return True
    try:
        sets_aside = _beside(shard).read_bytes()
    except FileNotFoundError:
        return False
    return _content_of(of_shard, hashlib.sha256(sets_aside).hexdigest()) == content


def _beside(shard: Location) -> Location:
    """Where a shard's quarantine lies, if it has one."""
    return shard.parent / QUARANTINE / shard.name


def _quarantine_of(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{QUARANTINE}/{file}"


def _content(data: bytes, sets_aside: bytes | None) -> str:
    of_shard = hashlib.sha256(data).hexdigest()
    return _content_of(of_shard, hashlib.sha256(sets_aside).hexdigest() if sets_aside is not None else None)


def _content_of(shard: str, quarantine: str | None) -> str:
    """Of their sha256."""
    if quarantine is None:
        return shard[:_DIGITS]
    return hashlib.sha256(f"{shard} {quarantine}".encode()).hexdigest()[:_DIGITS]
