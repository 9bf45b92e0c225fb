"""Dialogues as they stand in a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def stored(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as they are read from a shard: with every column of a message."""
    return [{"more": None, **message} for message in messages]
