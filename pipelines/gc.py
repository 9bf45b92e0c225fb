"""What nothing needs any more in an output folder: found, told, and removed beside runs that are at work."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dpo_ray.errors import ConfigError
from dpo_ray.progress import say
from dpo_ray.storage.artifact import MANIFEST
from dpo_ray.storage.claim import CLAIM, RENEWED_S, Claim, Lease, collecting
from dpo_ray.storage.garbage import WHY, Records, Refers, Removal, Stored, fingerprints_in, garbage
from dpo_ray.storage.location import Location
from pipelines.ingest import FILES

_UNITS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_SHORTEST_S = 2 * RENEWED_S
_SIDE_BY_SIDE = 16  # threads; they wait for a disk or an object store
_AT_ONCE = 256  # files that are removed before the lease is renewed
_ADAPTER = "adapter_config.json"
_RECORDS_OF_RUNS = ("summary.json", "stages.json", "config.yaml")


@dataclass(frozen=True)
class Collected:
    """What was found, and whether it was removed."""

    removals: list[Removal]
    unreadable: list[str]
    """Folders of artifacts whose records could not be read, so that nothing of their kinds was looked at."""
    older_than: str
    deleted: bool


def collect(output: Location, older_than: str = "7d", *, delete: bool = False) -> Collected:
    """Find what goes, and remove it if told to. Raises ConfigError, and DpoRayError where it was held up."""
    bound = seconds(older_than)
    if not (output / "artifacts").children():
        raise ConfigError(f"{output} holds no artifacts: name the folder given as run.output.")
    with collecting(output) if delete else nullcontext() as lease:
        # The listing comes after the marker: a claim is either in it, or waits.
        now = lease.now if lease is not None else time.time()
        with lease.renewed() if lease is not None else nullcontext():  # it may take many minutes
            files = list(_stored(output))
            records = _records(output, files, now, bound)
        removals = garbage(files, records, now, bound)
        if lease is not None:
            _remove(output / "artifacts", removals, lease)
    return Collected(removals, sorted(records.unreadable), older_than, delete)


def seconds(bound: str) -> float:
    """Of 7d, 36h or 2w. Raises ConfigError, also where it is too short for runs that are at work."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", bound.strip())
    if found is None:
        raise ConfigError(
            f"--older-than {bound} is no length of time: give a number with h, d or w, as in 36h, 7d, 2w."
        )
    length = float(found[1]) * _UNITS[found[2]]
    if length < _SHORTEST_S:
        raise ConfigError(
            f"--older-than {bound} is too short: runs at work say every {RENEWED_S / 3600:g} h what they need, so at "
            f"least {_SHORTEST_S / 3600:g}h have to be spared."
        )
    return length


def _stored(output: Location) -> Iterator[Stored]:
    folder = output / "artifacts"
    for info in folder.files():
        name = folder.same_store(info.path).uri.removeprefix(f"{folder.uri}/")
        if name.startswith(f"{FILES.rpartition('/')[2]}/"):  # of input files, and no artifact
            continue
        yield Stored(name, info.size or 0, (info.mtime_ns or 0) / 1e9)


def _records(output: Location, files: list[Stored], now: float, bound: float) -> Records:
    folders = [file.name.rpartition("/") for file in files if file.name.count("/") == 2]
    of_manifests = [folder for folder, _, name in folders if name == MANIFEST]
    of_claims = [folder for folder, _, name in folders if name == CLAIM]
    artifacts = output / "artifacts"
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as threads:
        manifests = dict(zip(of_manifests, threads.map(lambda f: _manifest(artifacts / f), of_manifests), strict=True))
        claims = dict(zip(of_claims, threads.map(lambda f: _claim(artifacts / f), of_claims), strict=True))
        texts = threads.map(_text, _records_that_name(output, now, bound))
        named = {fingerprint for text in texts for fingerprint in fingerprints_in(text)}
    unreadable = {folder for found in (manifests, claims) for folder, one in found.items() if one is None}
    for folder in sorted(unreadable):
        say("gc", f"{artifacts / folder}: its manifest or claim cannot be read, so nothing of its kind is removed")
    return Records(
        {folder: one for folder, one in manifests.items() if one is not None},
        {folder: one for folder, one in claims.items() if one is not None},
        frozenset(named),
        frozenset(unreadable),
    )


def _records_that_name(output: Location, now: float, bound: float) -> list[Location]:
    """Of runs that wrote something of late, all sweeps, and the published adapters, whose base may be an artifact."""
    of_runs: dict[str, list[tuple[float, Location]]] = defaultdict(list)
    runs = output / "runs"
    for info in runs.files():
        place = runs.same_store(info.path)
        run_id = place.uri.removeprefix(f"{runs.uri}/").partition("/")[0]
        of_runs[run_id].append(((info.mtime_ns or 0) / 1e9, place))
    recent = [inside for inside in of_runs.values() if now - max(at for at, _ in inside) < bound]
    found = [place for inside in recent for _, place in inside if place.name in _RECORDS_OF_RUNS]
    sweeps, models = output / "sweeps", output / "models"
    found += [sweeps.same_store(info.path) for info in sweeps.files()]
    return found + [place for info in models.files() if (place := models.same_store(info.path)).name == _ADAPTER]


def _text(place: Location) -> str:
    try:
        return place.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _manifest(folder: Location) -> Refers | None:
    """Of any schema; None where it cannot be read."""
    try:
        found: Any = json.loads((folder / MANIFEST).read_bytes())
        files = frozenset(sys.intern(str(entry["name"])) for entry in found["files"])
        return Refers(frozenset(map(str, found["inputs"].values())), files)
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _claim(folder: Location) -> Claim | None:
    try:
        return Claim.model_validate_json((folder / CLAIM).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _remove(artifacts: Location, removals: list[Removal], lease: Lease) -> None:
    def remove(file: Stored) -> None:
        lease.require()
        (artifacts / file.name).remove()

    for removal in removals:  # all manifests before anything that they name
        if removal.what == "artifacts":
            lease.hold()
            (artifacts / f"{removal.folder}/{MANIFEST}").remove()
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as threads:
        for removal in removals:
            for first in range(0, len(removal.files), _AT_ONCE):
                lease.hold()
                list(threads.map(remove, removal.files[first : first + _AT_ONCE]))
            if removal.folder is not None:
                lease.hold()
                (artifacts / removal.folder).remove_folder()
    lease.hold()


def lines(found: Collected, *, as_json: bool = False) -> Iterator[str]:
    """What a person, or a program, is told of it."""
    groups: dict[tuple[str, str], list[Removal]] = defaultdict(list)
    for removal in found.removals:
        groups[removal.kind, removal.what].append(removal)
    told: list[dict[str, Any]] = [
        {
            "kind": kind,
            "what": what,
            "why": WHY[group[0].what],
            "files": sum(len(one.files) for one in group),
            "bytes": sum(one.bytes for one in group),
        }
        for (kind, what), group in sorted(groups.items())
    ]
    total = {name: sum(row[name] for row in told) for name in ("files", "bytes")}
    if as_json:
        head = {"older_than": found.older_than, "deleted": found.deleted, "unreadable": found.unreadable}
        yield json.dumps({**head, **total, "removals": told}, indent=1)
        return
    for row in told:
        yield f"{row['kind']}: {row['what']}, {row['files']} files, {_size(row['bytes'])}: {row['why']}"
    what = "removed" if found.deleted else "would be removed; --delete does it"
    yield f"{total['files']} files, {_size(total['bytes'])}, last used over {found.older_than} ago: {what}"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
