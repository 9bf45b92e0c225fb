"""A small file that says how work stands while it goes on, for who looks from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dpo_ray.progress import say
from dpo_ray.storage.location import Location

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
    ended, failed = threading.Event(), False

    def write() -> None:
        nonlocal failed
        try:
            place.write_bytes(content())
        except (
            Exception
        ) as error:  # a GPU that has failed cannot be asked either: what ended the work is told, not this
            if not failed:
                say(stage, f"{place}, which `dpo-ray watch` reads, could not be written ({error}); tried again later")
            failed = True

    def keep() -> None:
        while not ended.wait(EVERY_S):
            write()

    write()
    thread = threading.Thread(target=keep, name=f"told {place.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write()
