"""Claims of stages at work, and markers of gc at work: how files are removed beside runs that go on.

<output>/artifacts/<kind>/<fingerprint>/claim.json   what a stage will refer to; written anew whenever it is taken up
<output>/artifacts/gc/<name>.json                    a gc that removes files is at work

A stage writes its claim before it looks what is there, and gc writes its marker before it looks at claims. So one of
them sees the other: what was claimed before the marker came is spared, and a stage whose claim came later waits until
the marker has gone. A claim says what is wanted and not what was found, so it comes before the look.

All times are the store's own, of claims and markers alike: machines' clocks need not agree. Both are renewed while
their process lives. A marker that was not is the trace of a killed gc, and a gc that was held up gives up by itself.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

from pydantic import BaseModel, ConfigDict, Field

from dpo_ray.errors import DpoRayError
from dpo_ray.progress import say
from dpo_ray.storage.location import Location
from dpo_ray.storage.repeated import repeated

CLAIM = "claim.json"
MARKERS = "gc"
"""Name of the folder of markers, below artifacts/."""

RENEWED_S = 3600.0
"""Seconds after which a claim is written anew; gc refuses bounds that are not well above it."""
LEASE_S = 300.0
"""Seconds after which a marker that was not renewed counts for nothing."""
_POLL_S = 1.0


class Claim(BaseModel):
    """What a stage will refer to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: dict[str, str] = Field(default_factory=dict)
    """Of the artifact: name → fingerprint."""
    tasks: list[str] = Field(default_factory=list)
    """What its shards are made from: what the names of shards begin with."""


@contextmanager
def claim(output: Location, artifact: Location, inputs: Mapping[str, str], tasks: Sequence[str]) -> Iterator[None]:
    """Claim an artifact's inputs and the shards of its tasks, and renew the claim until the block ends; it stays.

    The block begins when no gc is at work below `output` that did not see the claim.
    """
    found = Claim(inputs=dict(inputs), tasks=sorted(set(tasks)))
    place, content = artifact / CLAIM, found.model_dump_json().encode()
    place.write_bytes(content)
    while not _seen_by_collectors(output, place):
        place.write_bytes(content)
    with _renewed(place, content):
        yield


@contextmanager
def kept_fresh(place: Location, content: bytes) -> Iterator[None]:
    """Write a small file, and write it again and again for as long as the block goes on."""
    place.write_bytes(content)
    with _renewed(place, content):
        yield


def _renewed(place: Location, content: bytes) -> AbstractContextManager[None]:
    def renew() -> None:
        try:
            place.write_bytes(content)
        except OSError as error:
            say("gc", f"{place}, which keeps files from being removed, could not be renewed ({error}); next try later")

    return repeated(renew, RENEWED_S, "claim")


def _seen_by_collectors(output: Location, mine: Location) -> bool:
    """Wait for those whose markers are there; whether the claim still is. mine: it was just written.

    They may have looked before it came, and may remove it with the folder of an artifact that nobody needed. A marker
    that comes later is one of a gc that sees the claim.
    """
    folder = output / "artifacts" / MARKERS
    markers = _written(folder)
    if not markers:
        return True
    now = mine.written() or 0.0
    # Seconds that a marker was not renewed for: at first by the store's time, then as long as one looks at it.
    unchanged = {name: (at, max(0.0, now - at), time.monotonic()) for name, at in markers.items()}
    said = False
    while any(age + time.monotonic() - since < LEASE_S for _, age, since in unchanged.values()):
        if not said:
            say(
                "gc",
                f"dpo-ray gc removes files below {output}: waiting until it has ended, or has given no sign for "
                f"{LEASE_S / 60:g} min (its marker is in {folder})",
            )
            said = True
        time.sleep(_POLL_S)
        markers = _written(folder)
        unchanged = {
            name: seen if seen[0] == markers[name] else (markers[name], 0.0, time.monotonic())
            for name, seen in unchanged.items()
            if name in markers
        }
    return mine.written() is not None


def _written(folder: Location) -> dict[str, float]:
    """Name of a marker → when it was written, in the store's seconds."""
    infos = folder.files()
    return {info.base_name: (info.mtime_ns or 0) / 1e9 for info in infos if not info.base_name.startswith(".")}


class Lease:
    """The right to remove files, for a little while."""

    def __init__(self, marker: Location) -> None:
        self._marker = marker
        self.now = self._write()
        """By the store's own time, in seconds since the epoch."""

    def require(self) -> None:
        """Called before every single removal. Raises DpoRayError where the lease was not renewed in time."""
        if time.monotonic() > self._until:
            raise DpoRayError(
                "gc was held up, and stages may have begun meanwhile that need what it was to remove: nothing more is "
                "removed. The same command looks again and goes on."
            )

    def hold(self) -> None:
        """Renew it; called before every few removals. Raises DpoRayError where it has run out meanwhile."""
        before, self.now = self.now, self._write()
        if self.now - before > LEASE_S / 2:
            raise DpoRayError(
                f"gc was held up for {self.now - before:.0f} s, and stages may have begun meanwhile that need what it "
                "was to remove: nothing more is removed. The same command looks again and goes on."
            )

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew it beside the block's work; where that fails or comes late, the next `hold` tells."""

        def renew() -> None:
            with suppress(OSError):
                now = self._write()
                if now - self.now <= LEASE_S / 2:
                    self.now = now

        with repeated(renew, LEASE_S / 10, "gc's lease"):
            yield

    def _write(self) -> float:
        self._until = time.monotonic() + LEASE_S / 2
        self._marker.write_bytes(b"")  # which also a full disk has room for
        return self._marker.written() or 0.0


@contextmanager
def collecting(output: Location) -> Iterator[Lease]:
    """Have stages that begin from here on wait until the block ends."""
    marker = output / "artifacts" / MARKERS / f"{uuid.uuid4().hex}.json"
    try:
        yield Lease(marker)
    finally:
        marker.remove()
