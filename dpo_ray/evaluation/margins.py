"""Held-out accuracy, and who wins on each prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_ray.estimates import Estimate, proportion


def preference_accuracy(margins: np.ndarray, noise: float = 0.0) -> Estimate | None:
    """Share of pairs [n] whose margin (without beta, in nats) is positive.

    Undefined, None, where no margin is larger than `noise`: a policy that equals the reference prefers nothing,
    and its margins are 0 but for the difference between the engines that scored policy and reference.
    """
    if len(margins) == 0 or float(np.max(np.abs(margins))) <= noise:
        return None
    return proportion(int(np.sum(margins > 0)), len(margins))


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
