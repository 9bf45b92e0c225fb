"""Held-out accuracy, and who wins on each prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dpo_ray.estimates import Estimate, proportion
from dpo_ray.evaluation.agreement import NONE, Noise


def preference_accuracy(margins: np.ndarray, noise: Noise = NONE) -> Estimate | None:
    """Share of pairs [n] whose margin (without beta, in nats) is positive.

    Undefined, None, for a policy that equals the reference: it prefers nothing, and its margins are 0 but for the
    difference between the engines that scored policy and reference. So it is where no margin is larger than that noise
    makes them, nor their mean farther from 0 than its own error (twice) and the noise's mean: in bfloat16 a real
    preference may hide in the noise of one pair, and shows over many.
    """
    n = len(margins)
    if n == 0:
        return None
    error = float(np.std(margins, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    small = float(np.max(np.abs(margins))) <= noise.margin
    if small and abs(float(np.mean(margins))) <= 2 * error + noise.mean:
        return None
    return proportion(int(np.sum(margins > 0)), len(margins))


HIDING = 0.5
"""Share of margins within the noise from which on it is told of."""


def within_noise(share: float, nats: float) -> str:
    """That the scores' rounding, or their engines, could have made so many of the margins."""
    return (
        f"{share:.0%} of the margins are no larger than what scoring alone makes of them ({nats:.2g} nats, by the "
        "calibration), so that the accuracy lies nearer to .5 than it would: score with model.dtype=float32 to know it"
    )


def accuracy_by_source(margins: np.ndarray, sources: np.ndarray, noise: Noise = NONE) -> dict[str, Estimate | None]:
    """Source of a mixture → the accuracy on its pairs, as of preference_accuracy.

    margins, sources: [n] of each pair; a source of None is none.
    """
    names = sorted({name for name in sources.tolist() if name is not None})
    return {name: preference_accuracy(margins[sources == name], noise) for name in names}


def mean_wins(shares: Sequence[Sequence[float]]) -> np.ndarray:
    """How often a tuned sample wins on each prompt [n], where a judge has compared each with base samples.

    shares: prompt → for each tuned sample the share of its comparisons that it wins, ties as halves.
    """
    return np.array([float(np.mean(of_prompt)) for of_prompt in shares])


def win_shares(tuned: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> np.ndarray:
    """How often a tuned sample scores above a base sample of the same prompt [n]; ties count one half.

    tuned, base: prompt → scores of its samples. Each prompt counts once, as the mean over all pairings of its
    samples, for samples of one prompt are not independent.
    """
    per_prompt = []
    for mine, theirs in zip(tuned, base, strict=True):
        difference = np.subtract.outer(np.asarray(mine, dtype=float), np.asarray(theirs, dtype=float))
        per_prompt.append(float(np.mean((difference > 0) + 0.5 * (difference == 0))))
    return np.array(per_prompt)
