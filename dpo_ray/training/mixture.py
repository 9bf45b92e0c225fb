"""How many pairs of each source the first so many pairs of a training have.

Weights are shares, and shares of a number of pairs are not whole. Seats in a parliament are dealt out by the same
question: here by the method of Sainte-Laguë (Webster), because with it nobody loses a seat when there is one more to
give. So the pairs up to any step are what a formula says, each source within a few of its exact share, and a training
that goes on at a step need not go through those before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction


class Mixture:
    """Shares of named sources."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """weights: source → its weight, above 0."""
        exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # 0.3 is meant, not its double
        total = sum(exact.values())
        self.shares = {name: weight / total for name, weight in exact.items()}

    def taken(self, count: int) -> dict[str, int]:
        """Source → its pairs among the first `count`, which add up to it, and of no source become fewer."""
        # The j-th seat of a source with share w is given when (j − ½)/w comes up, the smallest first; (count − S/2) of
        # S sources is a value that no more than `count` seats come up to.
        reached = count - Fraction(len(self.shares), 2)
        seats = {name: max(0, math.floor(reached * share + Fraction(1, 2))) for name, share in self.shares.items()}
        for _ in range(count - sum(seats.values())):
            # min takes the first of equals.
            next_one = min(seats, key=lambda name: (seats[name] + Fraction(1, 2)) / self.shares[name])
            seats[next_one] += 1
        return seats
