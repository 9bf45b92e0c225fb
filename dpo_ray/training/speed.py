"""How fast a worker trains, tried out on a few pairs: for who wants to know what many trainings will take."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from dpo_ray.config import Model, Train
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.batch import Share
from dpo_ray.training.checkpoint import TrainState
from dpo_ray.training.optim import make_optimizer
from dpo_ray.training.parallel import Rank
from dpo_ray.training.start import start_policy
from dpo_ray.training.step import Learner


def tokens_per_second(model: Model, options: Train, pairs: Sequence[TokenizedPair], device: torch.device) -> float:
    """Of one worker that holds the whole model, in an optimizer step of one micro-batch: the faster of two, after one
    in which happens what happens once only.

    Tokens are counted as everywhere: a prompt once for each of its completions.
    """
    me = Rank(0, 1, device)
    scorer, forward = start_policy(ModelFolder.of(model), model, options, me, seed=0)
    learner = Learner(forward, scorer, make_optimizer(scorer.model, options), None, options, me, TrainState())
    share = Share([list(pairs)], filler=pairs[0])
    learner.step(share, 0.0, None)
    rates = []
    for _ in range(2):
        began = time.monotonic()
        found = learner.step(share, 0.0, None)
        rates.append(found.num_tokens / (time.monotonic() - began))
    return max(rates)
