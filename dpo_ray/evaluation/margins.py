"""Held-out accuracy, margins, win rate, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A proportion with its 95% interval over n independent observations."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def wilson(value: float, n: int) -> Estimate:
    """Wilson's score interval (Wilson 1927) for a proportion.

    Also for the mean of n scores in [0, 1], for which it is conservative: no variable in [0, 1] varies more
    than the 0/1 variable of the same mean. Raises ValueError for n = 0.
    """
    if n <= 0:
        raise ValueError("an estimate needs at least one observation")
    z2 = _Z95**2
    centre = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(value * (1 - value) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(value=value, low=max(0.0, centre - half), high=min(1.0, centre + half), n=n)


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


def quantiles(values: np.ndarray) -> dict[str, float]:
    """p50, p90, p99 and max of a sample that is not empty."""
    p50, p90, p99, top = np.quantile(values, [0.5, 0.9, 0.99, 1.0])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(top)}


def margin_noise(metrics: dict[str, Any], *, per_token: bool = False) -> float:
    """The largest margin, in nats, that two engines with this calibration may show for equal models.

    Args:
        per_token: for margins between means over tokens instead of sums.
    """
    # Chosen and rejected may be off by that much each.
    return 2 * metrics["token" if per_token else "sequence"]["max"]


def calibration(scored: Sequence[Sequence[float]], rescored: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How far two engines are apart on the same completions: |Δ| per token and per sequence, in nats.

    scored, rescored: completion → its token log-probs. `bias_per_token` is the mean signed difference; it is the
    dangerous one, for it grows with the length and becomes a preference for short or long answers.

    Raises ValueError where the two do not hold the same numbers of tokens.
    """
    if [len(a) for a in scored] != [len(b) for b in rescored]:
        raise ValueError("the two engines scored different numbers of tokens")
    differences = [
        np.asarray(a, dtype=float) - np.asarray(b, dtype=float) for a, b in zip(scored, rescored, strict=True)
    ]
    tokens = np.concatenate(differences)
    sequences = np.array([d.sum() for d in differences])
    return {
        "token": quantiles(np.abs(tokens)),
        "sequence": quantiles(np.abs(sequences)),
        "bias_per_token": float(tokens.mean()),
        "num_sequences": len(sequences),
        "num_tokens": len(tokens),
    }
