"""What a rank computes in an optimizer step, as the feed hands it to the trainer. It needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dpo_ray.pairs import TokenizedPair


def batch_weight(weights: Iterable[float | None]) -> float:
    """Of the weights of all pairs of a batch, in whatever order; None of a pair is 1."""
    return math.fsum(1.0 if weight is None else weight for weight in weights)


@dataclass(frozen=True)
class Share:
    """What one rank computes of a batch. Ranks have equally many micro-batches; some may be empty."""

    microbatches: list[list[TokenizedPair]]
    filler: TokenizedPair
    """Stands in for an empty micro-batch, with weight 0: every rank takes part in every exchange of FSDP."""
    batch_weight: float | None = None
    """The weights of all pairs of the batch, over all ranks, added up; None: each pair weighs 1."""

    @property
    def pairs(self) -> list[TokenizedPair]:
        """All pairs of the rank, in order."""
        return [pair for microbatch in self.microbatches for pair in microbatch]


@dataclass(frozen=True)
class Step:
    """What one rank computes in an optimizer step."""

    number: int
    share: Share
