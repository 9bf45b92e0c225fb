"""Which forward pass the trainer has: part of the identity of all that it scores. It needs no torch."""

from __future__ import annotations

from dpo_ray.storage.artifact import library_versions

VERSION = 3
"""Of the trainer's forward pass, raised when its numbers change: scores of before are then not taken over."""


def own_forward() -> str:
    """The version of the trainer's forward, as an engine."""
    return f"torch {library_versions()['torch']}, forward {VERSION}"
