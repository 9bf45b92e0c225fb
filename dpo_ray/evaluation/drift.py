"""How far the tuned model has gone from the base model, each with its 95% interval over prompts or pairs.

Differences and ratios are paired: both models answer the same prompts and score the same pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_ray.estimates import Estimate, bootstrap, proportion, rate
from dpo_ray.evaluation.texts import distinct, is_refusal, repetition

_SHARES = ("repetition", "refusals", "empty", "truncated")


class Answers(NamedTuple):
    """A model's completions of a prompt."""

    texts: Sequence[str]
    tokens: Sequence[int]
    finished: Sequence[bool]


def samples_drift(base: Sequence[Answers], tuned: Sequence[Answers]) -> dict[str, Any]:
    """What changed in the sampled answers; entry i of both is of the same prompt, and there is one at least.

    `length_ratio`: tokens of the tuned model's answers for each of the base model's. `base` and `tuned` have each the
    mean `tokens` of an answer, `distinct_1` and `distinct_2`, and as shares: `repetition` (sequences of three words
    that stood before in the answer), `refusals`, `empty` and `truncated` answers.
    """
    lengths = np.array([[float(np.sum(side.tokens)) for side in both] for both in zip(base, tuned, strict=True)])

    def ratio(of: np.ndarray) -> float:
        of_base, of_tuned = lengths[of].sum(axis=0)
        return float(of_tuned / of_base) if of_base else float("nan")

    found: dict[str, Any] = {"length_ratio": bootstrap(ratio, len(lengths)).as_dict() if lengths[:, 0].any() else None}
    for name, model in (("base", base), ("tuned", tuned)):
        texts = [text for prompt in model for text in prompt.texts]
        found[name] = {
            "tokens": float(np.mean([count for prompt in model for count in prompt.tokens])),
            "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2),
            **{share: rate(np.array([_share(share, prompt) for prompt in model])).as_dict() for share in _SHARES},
        }
    return found


def _share(name: str, answers: Answers) -> float:
    """Over a prompt's answers."""
    of_each: dict[str, list[float]] = {
        "repetition": [repetition(text) for text in answers.texts],
        "refusals": [float(is_refusal(text)) for text in answers.texts],
        "empty": [float(not text.strip()) for text in answers.texts],
        "truncated": [float(not finished) for finished in answers.finished],
    }
    return float(np.mean(of_each[name]))


def kl_per_token(log_ratios: np.ndarray, tokens: np.ndarray) -> Estimate:
    """KL(π‖π_ref) of a token, in nats, estimated on the policy's own samples: mean of log π − log π_ref.

    It is unbiased for samples at temperature 1 without top_p and the like, and may be below 0 by chance.

    Args:
        log_ratios: [n] summed over the samples of a prompt.
        tokens: [n] of these samples.
    """
    return bootstrap(lambda of: float(log_ratios[of].sum() / tokens[of].sum()), len(log_ratios))


def chosen_change(logps: np.ndarray, ref_logps: np.ndarray) -> dict[str, Any]:
    """Log-likelihood of held-out chosen answers before and after, in nats an answer: DPO lowers it, as a rule.

    Args:
        logps, ref_logps: [n] sums under the policy and under the reference.
    """
    change = logps - ref_logps
    return {
        "before": float(np.mean(ref_logps)),
        "after": float(np.mean(logps)),
        "change": bootstrap(lambda of: float(np.mean(change[of])), len(change)).as_dict(),
    }


def accuracy_by_length(margins: np.ndarray, chosen_tokens: np.ndarray, rejected_tokens: np.ndarray) -> dict[str, Any]:
    """Accuracy of held-out pairs whose chosen answer is the longer one, the shorter one, or as long; and by thirds of
    the pairs by the tokens of both answers. [n] each; of an empty bucket there is no entry.
    """
    both = chosen_tokens + rejected_tokens
    low, high = np.quantile(both, [1 / 3, 2 / 3])
    buckets = {
        "chosen longer": chosen_tokens > rejected_tokens,
        "chosen shorter": chosen_tokens < rejected_tokens,
        "as long": chosen_tokens == rejected_tokens,
        f"up to {low:.0f} tokens": both <= low,
        f"{low:.0f} to {high:.0f} tokens": (both > low) & (both <= high),
        f"over {high:.0f} tokens": both > high,
    }
    return {
        name: proportion(int(np.sum(margins[bucket] > 0)), int(np.sum(bucket))).as_dict()
        for name, bucket in buckets.items()
        if np.any(bucket)
    }
