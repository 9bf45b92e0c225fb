"""Held-out accuracy, margins, win rate, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_ray.estimates import Estimate, wilson


def preference_accuracy(margins: np.ndarray, noise: float = 0.0) -> Estimate | None:
    """Share of pairs [n] whose margin (without beta, in nats) is positive.

    Undefined, None, where no margin is larger than `noise`: a policy that equals the reference prefers nothing,
    and its margins are 0 but for the difference between the engines that scored policy and reference.
    """
    if len(margins) == 0 or float(np.max(np.abs(margins))) <= noise:
        return None
    return wilson(float(np.mean(margins > 0)), len(margins))


def win_rate(tuned: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Estimate | None:
    """How often a tuned sample scores above a base sample of the same prompt; ties count one half.

    tuned, base: prompt → scores of its samples. Each prompt counts once, as the mean over all pairings of its
    samples, for samples of one prompt are not independent. None without prompts.
    """
    per_prompt = []
    for mine, theirs in zip(tuned, base, strict=True):
        difference = np.subtract.outer(np.asarray(mine, dtype=float), np.asarray(theirs, dtype=float))
        per_prompt.append(float(np.mean((difference > 0) + 0.5 * (difference == 0))))
    return wilson(float(np.mean(per_prompt)), len(per_prompt)) if per_prompt else None
