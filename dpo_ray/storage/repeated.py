"""Work that is done again and again beside other work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(work: Callable[[], None], seconds: float, name: str) -> Iterator[None]:
    """Do it every so many seconds, by a thread of this name, until the block ends; none of it goes on then.

    Args:
        work: raises nothing, for nobody would hear of it.
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
