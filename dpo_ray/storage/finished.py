"""Going through stages to learn whether all of them are finished, without computing anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal


class NotFinished(Exception):
    """Something is to be computed; says what."""


_Use = Literal["takes", "looks"]
_only_finished: ContextVar[_Use | None] = ContextVar("only_finished", default=None)


@contextmanager
def only_finished(*, claims: bool = True) -> Iterator[None]:
    """Within it, whatever would compute raises NotFinished.

    Args:
        claims: what is finished is claimed, as a run does that uses it; otherwise nothing at all is written.
    """
    token = _only_finished.set("takes" if claims else "looks")
    try:
        yield
    finally:
        _only_finished.reset(token)


def only_looks() -> bool:
    """Whether nothing at all is to be written."""
    return _only_finished.get() == "looks"


def about_to_compute(what: object) -> None:
    """Called before work begins. Raises NotFinished where only what is finished is wanted."""
    if _only_finished.get() is not None:
        raise NotFinished(str(what))
