"""Whether two engines compute the same model: how far apart they are on the same completions, and what that allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ray.config.tolerance import Limits
from dpo_ray.errors import ReferenceMismatch
from dpo_ray.estimates import quantiles

_SURE = 3.0
"""Standard errors by which a bias has to be over its limit: noise alone does that to one comparison in 700."""
_LIKELY = 2.0


def calibration(scored: Sequence[Sequence[float]], rescored: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How far two engines are apart on the same completions; Δ is scored minus rescored, in nats.

    scored, rescored: completion → its token log-probs. Raises ValueError where the two do not hold the same numbers of
    tokens.
    """
    if [len(a) for a in scored] != [len(b) for b in rescored]:
        raise ValueError("the two engines scored different numbers of tokens")
    with np.errstate(invalid="ignore"):
        differences = [np.asarray(a, float) - np.asarray(b, float) for a, b in zip(scored, rescored, strict=True)]
    return calibration_of(differences)


@np.errstate(invalid="ignore")  # for is_finite to tell
def calibration_of(differences: Sequence[np.ndarray]) -> dict[str, Any]:
    """The measures of Δ, in nats; completions without a token do not count.

    `token`, `worst_token` and `sequence` are quantiles, over tokens of |Δ|, over completions of their largest |Δ|, and
    over completions of |ΣΔ|. `bias_per_token` is the mean of Δ over all tokens; it is the dangerous one, for it grows
    with the length and becomes a preference for short or long answers. `bias_standard_error` is that of a ratio whose
    observations are the completions, for tokens of one completion are not independent (Cochran 1977, Sampling
    Techniques, chapter 6); None of one completion, which tells none.

    differences: completion → Δ of its tokens. Raises ValueError where there is no token.
    """
    present = [one for one in differences if len(one)]
    if not present:
        raise ValueError("there is no token to compare the two engines on")
    tokens = np.concatenate(present)
    sums, lengths = np.array([one.sum() for one in present]), np.array([len(one) for one in present])
    bias = float(tokens.mean())
    n, error = len(present), None
    if n > 1:
        error = math.sqrt(n / (n - 1) * float(np.sum((sums - bias * lengths) ** 2))) / len(tokens)
    return {
        "token": quantiles(np.abs(tokens)),
        "worst_token": quantiles(np.array([np.abs(one).max() for one in present])),
        "sequence": quantiles(np.abs(sums)),
        "bias_per_token": bias,
        "bias_standard_error": error,
        "num_sequences": n,
        "num_tokens": len(tokens),
    }


def is_finite(metrics: dict[str, Any]) -> bool:
    """Whether all log-probs of a calibration are numbers."""
    return math.isfinite(metrics["token"]["max"]) and math.isfinite(metrics["bias_per_token"])


def disagreement(metrics: dict[str, Any], limits: Limits) -> str | None:
    """What of a finite calibration is over its limit, each with its value; None: the two compute the same model."""
    bias, error = metrics["bias_per_token"], metrics["bias_standard_error"]
    found = []
    if error is not None and not abs(bias) <= limits.bias_per_token + _SURE * error:
        found.append(f"the mean of Δ per token is {bias:+.1e} ± {error:.1e} (bias_per_token={limits.bias_per_token:g})")
    if not (p99 := metrics["token"]["p99"]) <= limits.p99_per_token:
        found.append(f"the 99th percentile of |Δ| per token is {p99:.1e} (p99_per_token={limits.p99_per_token:g})")
    if not (worst := metrics["worst_token"]["p50"]) <= limits.worst_token:
        found.append(
            f"half of the completions have a token with |Δ| ≥ {worst:.1e} (worst_token={limits.worst_token:g})"
        )
    return "; ".join(found) or None


def told(metrics: dict[str, Any]) -> str:
    """A calibration in a line."""
    error = metrics["bias_standard_error"]
    return (
        f"Δ per token {metrics['bias_per_token']:+.1e}{'' if error is None else f' ± {error:.1e}'} nats, |Δ| p99 "
        f"{metrics['token']['p99']:.1e}, worst of a completion {metrics['worst_token']['p50']:.1e}, per sequence p50 "
        f"{metrics['sequence']['p50']:.1e}, max {metrics['sequence']['max']:.1e}"
    )


def require_same_start(limits: Limits, differences: Sequence[np.ndarray]) -> None:
    """The last look at the reference: log π − log π_ref at the first step, where the two are the same model still.

    differences: completion → that of its tokens. Raises ReferenceMismatch.
    """
    metrics = calibration_of(differences)
    wrong = disagreement(metrics, limits) if is_finite(metrics) else "there are log-probs that are not finite"
    if wrong is not None:
        raise ReferenceMismatch(
            f"At the first step policy and reference are the same model still, and yet of {metrics['num_sequences']} "
            f"completions {wrong}, in nats; the limits are those of reference.tolerance. Training would start from a "
            "wrong zero. Check that the reference artifact was made for this model, or leave --reference out to have "
            "the reference computed; reference.engine=torch scores it with the trainer's own forward."
        )


@dataclass(frozen=True)
class Noise:
    """What two engines make of the margins of equal models, in nats."""

    margin: float = 0.0
    """The largest margin that they may show."""
    mean: float = 0.0
    """The largest mean over all pairs."""


NONE = Noise()


def margin_noise(metrics: dict[str, Any], num_tokens: float, *, per_token: bool = False) -> Noise:
    """The noise that a calibration lets expect.

    Args:
        num_tokens: mean over the pairs of the tokens of chosen less those of rejected.
        per_token: margins are between means over tokens instead of sums; a bias falls out of them.
    """
    # Chosen and rejected may be off by that much each.
    largest = 2 * float(metrics["token" if per_token else "sequence"]["max"])
    bias = abs(metrics["bias_per_token"]) + _LIKELY * (metrics["bias_standard_error"] or 0.0)
    return Noise(largest, 0.0 if per_token else bias * abs(num_tokens))
