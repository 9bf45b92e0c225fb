"""A small file that says how work stands while it goes on, for who looks from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dpo_ray.progress import say
from dpo_ray.storage.location import Location
from dpo_ray.storage.repeated import repeated

EVERY_S = 10.0
"""Seconds between two writes: a request to an object store costs little so, and a viewer is not far behind."""


@contextmanager
def kept_told(place: Location, content: Callable[[], bytes], stage: str) -> Iterator[None]:
    """Write the file at the beginning, every EVERY_S seconds by a thread of its own, and at the end of the block.

    A write that fails is said once and tried again: the work goes on without it.

    Args:
        content: called by either thread.
        stage: whose line says that a write failed.
    """
    failed = False

    def write() -> None:
        nonlocal failed
        try:
            place.write_bytes(content())
        # A GPU that has failed cannot be asked either: what ended the work is to be told, and not this.
        except Exception as error:
            if not failed:
                say(stage, f"{place}, which `dpo-ray watch` reads, could not be written ({error}); tried again later")
            failed = True

    write()
    try:
        with repeated(write, EVERY_S, f"told {place.name}"):
            yield
    finally:
        write()
