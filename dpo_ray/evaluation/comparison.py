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
from dpo_ray.histogram import histograms

MOST_CHARACTERS = 2000
"""Of a prompt or an answer that is shown."""


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
    in `greedy_win_rate`.

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
    log_ratios = np.array([sum(one.log_ratios[greedy:]) for one in answered])
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
        "kl_per_token": kl_per_token(log_ratios, drawn * lengths[1]).as_dict(),
        "drift": samples_drift(*answers),
        "win_rate_by_length": {name: one.as_dict() for name, one in wins_by_length(wins, *lengths).items()},
        "histograms": {
            "tokens": histograms({"before": lengths[0], "after": lengths[1]}),
            "kl_per_token": histograms({"after": log_ratios / np.maximum(1.0, drawn * lengths[1])}),
        },
    }


def shown_samples(
    answered: Sequence[Answered], sources: Mapping[str, str], sampling: Sampling, *, in_pairs: bool, most: int
) -> list[dict[str, Any]]:
    """The answers to the first prompts, whatever came of them: the first one that was drawn from each model.

    `outcome` is the tuned model's on these two answers: won, lost or tied; where a judge has compared the tuned answer
    with several of the other model's, it is that of most of these. `rewards` has what both were given, the other
    model's None where a judge compares. Texts are cut after MOST_CHARACTERS, with a note of what is left out.

    Args:
        sources, in_pairs: as of wins_by_source and compare.
    """
    return [_shown(one, sources, sampling.samples, in_pairs) for one in answered[:most]]


def _shown(one: Answered, sources: Mapping[str, str], samples: int, in_pairs: bool) -> dict[str, Any]:
    before, after = one.row["completions"][0], one.row["completions"][samples]
    reward = float(one.rewards[samples])
    equal = 0.5 if in_pairs else float(one.rewards[0])
    *earlier, last = one.row["prompt"]
    return {
        "prompt": bounded(last["content"]),
        **({"earlier": bounded("\n".join(f"{m['role']}: {m['content']}" for m in earlier))} if earlier else {}),
        "before": _text(before),
        "after": _text(after),
        "outcome": "won" if reward > equal else "lost" if reward < equal else "tied",
        "rewards": [None if in_pairs else equal, reward],
        "tokens": [before["num_tokens"], after["num_tokens"]],
        "source": sources.get(one.row["prompt_id"]),
    }


def bounded(text: str) -> str:
    """The text, or its beginning with a note on how much is left out."""
    left_out = len(text) - MOST_CHARACTERS
    return text if left_out <= 0 else f"{text[:MOST_CHARACTERS]} [… {left_out:,} more characters]"


def wins_by_length(wins: np.ndarray, other: np.ndarray, tuned: np.ndarray) -> dict[str, Estimate]:
    """The win rate where the tuned model's answers are the longer ones, the shorter ones, or as long; and by thirds of
    the prompts by the length of the other model's answers. Of an empty bucket there is no entry.

    Args:
        wins: [n] how often the tuned model wins on a prompt.
        other, tuned: [n] mean tokens of the answers to it.
    """
    low, high = np.quantile(other, [1 / 3, 2 / 3])
    buckets = {
        "tuned longer": tuned > other,
        "tuned shorter": tuned < other,
        "as long": tuned == other,
        f"opponent up to {low:.0f} tokens": other <= low,
        f"opponent {low:.0f} to {high:.0f} tokens": (other > low) & (other <= high),
        f"opponent over {high:.0f} tokens": other > high,
    }
    return {name: rate(wins[bucket]) for name, bucket in buckets.items() if np.any(bucket)}


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
    """With a mark where it was cut while it was drawn."""
    text = bounded(completion["text"].strip())
    return text if completion["finished"] else f"{text} […]"
