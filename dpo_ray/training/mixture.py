"""A mixture of sources: how many pairs of each the first so many pairs of a training have, and what came of them.

Weights are shares, and shares of a number of pairs are not whole. Seats in a parliament are dealt out by the same
question: here by the method of Sainte-Laguë (Webster), because with it nobody loses a seat when there is one more to
give. So the pairs up to any step are what a formula says, each source within a few of its exact share, and a training
that goes on at a step need not go through those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any


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


def mixture_lines(sources: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """What a training takes of each source, for the log. sources: as StepPlan.trained gives them."""
    for name, taken in sources.items():
        yield (
            f"source {name}: {taken['pairs']:.0f} pairs, {taken['share']:.1%} of all that are trained on, each pair "
            f"{taken['passes']:.2f} times"
        )


def by_source(
    sources: Mapping[str, Mapping[str, float]], history: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Source → its pairs, share and passes, and means of its metrics over the logged steps of the last epoch, each pair
    alike.

    Args:
        sources: as StepPlan.trained gives them.
        history: metrics of every logged step.
    """
    last = [line for line in history if line["epoch"] > history[-1]["epoch"] - 1]
    found: dict[str, dict[str, float]] = {}
    for name, taken in sources.items():
        prefix = f"sources/{name}/"
        metrics: dict[str, list[tuple[float, float]]] = {}
        for line in last:
            pairs = line.get(f"{prefix}pairs", 0)
            for key, value in line.items():
                if key.startswith(prefix) and key != f"{prefix}pairs":
                    metrics.setdefault(key.removeprefix(prefix), []).append((value, pairs))
        means = {key: sum(v * n for v, n in values) / sum(n for _, n in values) for key, values in metrics.items()}
        found[name] = {**taken, **means}
    return found
