"""Going through stages to learn whether all of them are finished, without computing anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class NotFinished(Exception):
    """Something is to be computed; says what."""


_only_finished: ContextVar[bool] = ContextVar("only_finished", default=False)


@contextmanager
def only_finished() -> Iterator[None]:
    """Within it, whatever would compute raises NotFinished."""
    token = _only_finished.set(True)
    try:
        yield
    finally:
        _only_finished.reset(token)


def about_to_compute(what: object) -> None:
    """Called before work begins. Raises NotFinished where only what is finished is wanted."""
    if _only_finished.get():
        raise NotFinished(str(what))
