"""What a sweep will cost, before it starts, and what sharing and early stopping save of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from dpo_ray.config import Config
from dpo_ray.config.tune import ASHA
from dpo_ray.training.index import PlanIndex

_EVALUATED = 1 / 3  # of what training on a token costs: one pass of three


@dataclass(frozen=True)
class Load:
    """What a trial computes."""

    num_steps: int
    tokens: float
    """A prompt once for each of its completions; a token that is only evaluated counts a third."""


def load_of(config: Config, num_steps: int, trained: PlanIndex, ranked: PlanIndex) -> Load:
    """Of a trial with this configuration, to its last step.

    Args:
        trained: its training pairs.
        ranked: the held-out pairs of an evaluation.
    """
    train = config.train
    training = num_steps * train.global_batch_size * _tokens_a_pair(trained)
    every = train.eval_every_steps or num_steps
    evaluations = -(-num_steps // every)
    evaluated = evaluations * min(len(ranked), train.eval_pairs) * _tokens_a_pair(ranked)
    return Load(num_steps, training + _EVALUATED * evaluated)


def _tokens_a_pair(index: PlanIndex) -> float:
    prompt, chosen, rejected = index.mean_lengths
    return float(2 * prompt + chosen + rejected)


def share_of_steps(scheduler: ASHA, eval_every_steps: int, num_steps: int) -> float:
    """Of all steps, what trials make in the mean where at each decision one of `reduction_factor` goes on."""
    milestone = float(scheduler.grace_steps or eval_every_steps)
    share, going, reached = 0.0, 1.0, 0.0
    while milestone < num_steps:
        share += going * (milestone - reached)
        reached, going, milestone = (
            milestone,
            going / scheduler.reduction_factor,
            milestone * scheduler.reduction_factor,
        )
    return (share + going * (num_steps - reached)) / num_steps


def estimate_lines(
    config: Config,
    loads: Sequence[Load],
    *,
    open_trials: int,
    at_once: int,
    tokens_per_second: float | None,
    rows_scored: int,
    preparations: int,
) -> list[str]:
    """What a person is told before the first trial.

    Args:
        loads: of trials that stand for all: the mean counts.
        open_trials: that are to be run.
        tokens_per_second: of one trial; None where it could not be tried out.
        rows_scored: by the shared reference; 0 without one.
        preparations: different sets of rows that trials train on.
    """
    tune = config.tune
    assert tune is not None
    repeats = tune.repeat_best.k * tune.repeat_best.seeds if tune.repeat_best is not None else 0
    steps = round(sum(load.num_steps for load in loads) / len(loads))
    tokens = sum(load.tokens for load in loads) / len(loads)
    share = 1.0
    lines = []
    if isinstance(tune.scheduler, ASHA) and config.train.eval_every_steps is not None:
        share = share_of_steps(tune.scheduler, config.train.eval_every_steps, steps)
    total = (open_trials * share + repeats) * tokens
    trials = f"{open_trials} trials" + (f" and {repeats} repetitions" if repeats else "")
    told = f"{trials} of about {steps} steps of {config.train.global_batch_size} pairs, {_large(tokens)} tokens each"
    if share < 1:
        told += f"; with asha about {share:.0%} of that, as it ends what falls behind"
    lines.append(told)
    if tokens_per_second is None:
        lines.append("how long that takes is told when the first trial has come to its end")
    else:
        seconds = total / tokens_per_second / at_once
        lines.append(
            f"about {_long(seconds)}, and what trials take to start: {_large(total)} tokens at "
            f"{tokens_per_second:.0f} a second in each trial, {at_once} at once"
        )
    if rows_scored:
        scored = (
            f"{rows_scored} rows, once for all trials"
            if preparations == 1
            else f"once for each of {preparations} sets of rows"
        )
        saved = max(open_trials - preparations, 0)
        lines.append(f"the reference has been scored ({scored}); without sharing it would be scored {saved} times more")
    return lines


def _large(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _long(seconds: float) -> str:
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return str(timedelta(seconds=round(seconds))).rpartition(",")[0]
