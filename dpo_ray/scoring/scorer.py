"""What every source of scores is: rows of candidates in, a score for each completion out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Row = Mapping[str, Any]
"""A row of candidates (dpo_ray.pairs.CANDIDATES)."""


class Scored(NamedTuple):
    """What a source gives to a completion."""

    score: float
    """Larger is better."""
    parts: Mapping[str, float] = {}
    """What the score is made of, by name; empty where the source tells none."""
    noted: tuple[str, ...] = ()
    """What is to be counted about it, by name."""


class Scorer(Protocol):
    """A source of scores."""

    def score(self, rows: Sequence[Row]) -> list[list[Scored]]:
        """Row → one for each of its completions, all finite."""
        ...


def weighted(scores: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The reward of each completion of a prompt.

    Args:
        scores: source → score of each completion.
        weights: of each source.
    """
    return [sum(w * s for w, s in zip(weights, of_one, strict=True)) for of_one in zip(*scores, strict=True)]
