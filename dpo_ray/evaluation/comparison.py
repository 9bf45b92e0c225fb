"""Two models' answers to the same prompts: who wins, and how far the tuned model has gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_ray.config import Sampling
from dpo_ray.estimates import Estimate, rate, verdict
from dpo_ray.evaluation.drift import Answers, kl_per_token, samples_drift
from dpo_ray.evaluation.length_control import length_controlled_win_rate
from dpo_ray.evaluation.margins import mean_wins, win_shares

SHOWN = 8
"""Prompts whose answers are shown, the first ones: whatever came of them."""


class Answered(NamedTuple):
    """A held-out prompt with the answers of both models."""

    row: Mapping[str, Any]
    """Of dpo_ray.pairs.CANDIDATES: the other model's completions, sampling.samples of them, then as many of the tuned
    one."""
    rewards: Sequence[float]
    """What the judges give to each."""
    log_ratios: Sequence[float]
    """log π − log π_ref of each completion of the tuned model, summed over its tokens."""


def compare(answered: Sequence[Answered], sampling: Sampling, *, in_pairs: bool) -> dict[str, Any]:
    """What an evaluation holds of sampled answers; there is one prompt at least.

    Rates and drift are of the drawn answers. Where sampling.include_greedy has the first one greedy, that one alone is
    in `greedy_win_rate`, and is shown in `samples`.

    Args:
        in_pairs: the rewards are shares of comparisons that a judge has made of each tuned answer with all of the other
            model's. Greedy answers are among these, and there is no `greedy_win_rate`.
    """
    samples, greedy = sampling.samples, int(sampling.include_greedy and not in_pairs)
    other, tuned = slice(greedy, samples), slice(samples + greedy, 2 * samples)
    wins = _wins(answered, tuned, other, in_pairs)
    win_rate = rate(wins)
    answers = [[_answers(one.row["completions"][side]) for one in answered] for side in (other, tuned)]
    lengths = [np.array([np.mean(prompt.tokens) for prompt in side]) for side in answers]
    drawn = samples - greedy
    return {
        "win_rate": win_rate.as_dict(),
        "verdict": verdict(win_rate, 0.5),
        "greedy_win_rate": rate(_wins(answered, slice(samples, samples + 1), slice(1), False)).as_dict()
        if greedy
        else None,
        "length_controlled_win_rate": length_controlled_win_rate(wins, lengths[1], lengths[0]).as_dict(),
        "mean_reward": {
            name: float(np.mean([reward for one in answered for reward in one.rewards[side]]))
            for name, side in (("base", other), ("tuned", tuned))
        },
        "kl_per_token": kl_per_token(
            np.array([sum(one.log_ratios[greedy:]) for one in answered]), drawn * lengths[1]
        ).as_dict(),
        "drift": samples_drift(*answers),
        "samples": [
            {
                "prompt": one.row["prompt"][-1]["content"],
                "before": _text(one.row["completions"][0]),
                "after": _text(one.row["completions"][samples]),
            }
            for one in answered[:SHOWN]
        ],
    }


def wins_by_source(
    answered: Sequence[Answered], sources: Mapping[str, str], sampling: Sampling, *, in_pairs: bool
) -> dict[str, Estimate]:
    """Source of a mixture → the win rate on its prompts, as of `compare`. sources: prompt_id → source."""
    samples, greedy = sampling.samples, int(sampling.include_greedy and not in_pairs)
    by_source: dict[str, list[Answered]] = {}
    for one in answered:
        if (name := sources.get(one.row["prompt_id"])) is not None:
            by_source.setdefault(name, []).append(one)
    tuned, other = slice(samples + greedy, 2 * samples), slice(greedy, samples)
    return {name: rate(_wins(mine, tuned, other, in_pairs)) for name, mine in sorted(by_source.items())}


def _wins(answered: Sequence[Answered], tuned: slice, other: slice, in_pairs: bool) -> np.ndarray:
    of_tuned = [one.rewards[tuned] for one in answered]
    # A judge has said who wins; of other sources the higher reward does.
    return mean_wins(of_tuned) if in_pairs else win_shares(of_tuned, [one.rewards[other] for one in answered])


def _answers(completions: Sequence[Mapping[str, Any]]) -> Answers:
    return Answers(*([completion[name] for completion in completions] for name in ("text", "num_tokens", "finished")))


def _text(completion: Mapping[str, Any]) -> str:
    """With a mark where it was cut."""
    text: str = completion["text"].strip()
    return text if completion["finished"] else f"{text} […]"
