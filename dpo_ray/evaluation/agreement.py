"""How far two engines are apart on the same completions, and what margin that alone may make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_ray.estimates import quantiles


def margin_noise(metrics: dict[str, Any], *, per_token: bool = False) -> float:
    """The largest margin, in nats, that two engines with this calibration may show for equal models.

    Args:
        per_token: for margins between means over tokens instead of sums.
    """
    # Chosen and rejected may be off by that much each.
    return 2 * float(metrics["token" if per_token else "sequence"]["max"])


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
