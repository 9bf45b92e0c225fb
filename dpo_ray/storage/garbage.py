"""Which files of an output folder nothing refers to any more: a decision over one listing, without touching a file.

An artifact is spared while a record names it (a run, a sweep, a published model), for some time after it was last made
or taken up, and for as long as what is made from it is spared. Its shards are spared with it, and any shard for some
time after it was written. What the claim of a stage names is spared as if a manifest named it, for there will be one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dpo_ray.storage.artifact import MANIFEST, POOL, QUARANTINE
from dpo_ray.storage.claim import CLAIM, MARKERS, Claim
from dpo_ray.storage.shard_pool import task_of

_FINGERPRINT = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")

What = Literal["artifacts", "unfinished artifacts", "shards", "left over", "unfinished writes"]

WHY: dict[What, str] = {
    "artifacts": "no late run, no sweep and no published adapter names them, and nothing kept was made from them",
    "unfinished artifacts": "they have no manifest, and no run has gone on with them",
    "shards": "no manifest and no claim names them",
    "left over": "they lie beside a manifest that does not name them: checkpoints, notes on attempts",
    "unfinished writes": "whoever wrote them was killed",
}


@dataclass(frozen=True)
class Stored:
    """A file."""

    name: str
    """Below <output>/artifacts."""
    bytes: int
    written: float
    """By the store's time, in seconds since the epoch."""


@dataclass(frozen=True)
class Refers:
    """What a manifest names."""

    inputs: frozenset[str]
    """Fingerprints, and hashes of other things."""
    files: frozenset[str]


@dataclass(frozen=True)
class Records:
    """What was read of the output folder, beside the listing."""

    manifests: Mapping[str, Refers] = field(default_factory=dict)
    """<kind>/<fingerprint> → what the manifest there names."""
    claims: Mapping[str, Claim] = field(default_factory=dict)
    """The same folders → the claim there."""
    named: frozenset[str] = frozenset()
    """Fingerprints in records of runs, sweeps and published models."""
    unreadable: frozenset[str] = frozenset()
    """Folders whose manifest or claim could not be read: nothing of their kind is removed."""


@dataclass(frozen=True)
class Removal:
    """Files that go for one reason."""

    kind: str
    what: What
    files: tuple[Stored, ...]
    folder: str | None = None
    """<kind>/<fingerprint> where the whole of it goes."""

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def fingerprints_in(text: str) -> set[str]:
    """All that may be fingerprints in a record, whatever its form: to spare too much costs nothing but room."""
    return set(_FINGERPRINT.findall(text))


def garbage(files: Iterable[Stored], records: Records, now: float, older_than: float) -> list[Removal]:
    """What goes, in the order in which it has to.

    Manifests come before what they name: whoever is killed in between leaves unfinished artifacts, which never load,
    and no finished one that lacks a file.

    Args:
        files: all below <output>/artifacts; what is neither an artifact's nor the pool's is not touched.
        now: by the store's time.
        older_than: seconds; what was written since is spared.
    """
    own: dict[str, list[Stored]] = defaultdict(list)
    pools: dict[str, list[Stored]] = defaultdict(list)
    markers = []
    for file in files:
        parts = file.name.split("/")
        if len(parts) >= 3 and parts[1] == POOL:
            pools[parts[0]].append(file)
        elif len(parts) >= 3 and _FINGERPRINT.fullmatch(parts[1]):
            own[f"{parts[0]}/{parts[1]}"].append(file)
        elif len(parts) == 2 and parts[0] == MARKERS:
            markers.append(file)

    def is_old(file: Stored) -> bool:
        return now - file.written >= older_than

    frozen = {folder.split("/")[0] for folder in records.unreadable}
    at_work = {folder for folder, inside in own.items() if not all(map(is_old, inside))}
    spared = _with_inputs(
        at_work | {f for f in own if f.split("/")[1] in records.named or f.split("/")[0] in frozen}, own, records
    )
    removals = []
    for folder, inside in sorted(own.items()):
        kind = folder.split("/")[0]
        if folder not in spared:
            what: What = "artifacts" if folder in records.manifests else "unfinished artifacts"
            removals.append(Removal(kind, what, tuple(inside), folder))
        elif folder in records.manifests and kind not in frozen:
            named = {f"{folder}/{name}" for name in (MANIFEST, CLAIM, *records.manifests[folder].files)}
            removals += _some(kind, "left over", [f for f in inside if f.name not in named and is_old(f)])
    for kind, inside in sorted(pools.items()):
        if kind in frozen:
            continue
        folders = [folder for folder in spared if folder.startswith(f"{kind}/")]
        # A shard and its quarantine, which have the same name, stay and go together.
        spared_names = {_base(f.name) for f in inside if not is_old(f)}
        for folder in folders:
            if folder in records.manifests:
                spared_names |= set(map(_base, records.manifests[folder].files))
        # Of a finished artifact that nobody has taken up lately the manifest says it all.
        waiting = [folder for folder in folders if folder in at_work or folder not in records.manifests]
        claimed = {task for folder in waiting if folder in records.claims for task in records.claims[folder].tasks}
        unnamed = [f for f in inside if _base(f.name) not in spared_names and task_of(f.name) not in claimed]
        # The quarantine last, as it was written first: a shard that is there has its own.
        for is_last in (False, True):
            removals += _some(kind, "shards", [f for f in unnamed if (f"/{QUARANTINE}/" in f.name) == is_last])
    removals += _some(MARKERS, "unfinished writes", list(filter(is_old, markers)))
    return sorted(removals, key=lambda removal: removal.what != "artifacts")


def _with_inputs(folders: set[str], own: Mapping[str, Sequence[Stored]], records: Records) -> set[str]:
    """These artifacts and all that they were made from."""
    by_fingerprint = defaultdict(list)
    for folder in own:
        by_fingerprint[folder.split("/")[1]].append(folder)
    found: set[str] = set()
    open_ = list(folders)
    while open_:
        folder = open_.pop()
        if folder in found:
            continue
        found.add(folder)
        inputs = set(records.manifests[folder].inputs) if folder in records.manifests else set()
        if folder in records.claims:
            inputs |= set(records.claims[folder].inputs.values())
        open_ += [other for fingerprint in inputs for other in by_fingerprint.get(fingerprint, ())]
    return found


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _some(kind: str, what: What, files: list[Stored]) -> list[Removal]:
    """Those that were being written told apart."""
    partial = [file for file in files if _base(file.name).startswith(".")]
    whole = [file for file in files if file not in partial]
    found = [Removal(kind, what, tuple(whole))] if whole else []
    return found + ([Removal(kind, "unfinished writes", tuple(partial))] if partial else [])
