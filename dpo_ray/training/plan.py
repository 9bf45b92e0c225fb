"""The step plan: which pairs make up which optimizer step, and how a step is spread over ranks.

The plan is computed from the index of the rows (dpo_ray.training.index) and a seed, and depends neither on time nor
on the number of workers: step t is the same global_batch_size pairs whoever computes it. Resuming at step t is
starting the plan at t.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dpo_ray.bins import first_fit, split_up, spread
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from dpo_ray.training.index import PlanIndex, index_of

ORDER = 2
"""Raised when a seed gives another order than before."""

_SHARDS_PER_WINDOW = 16  # rows are shuffled within so many shards, so that a step reads few files
_TOKENS_PER_WINDOW = 1 << 27  # of large shards fewer make up a window: some 1 GiB with their log-probs


@dataclass(frozen=True)
class StepPlan:
    """The order of the pairs over all epochs, cut into steps."""

    index: PlanIndex
    global_batch_size: int
    epochs: int
    seed: int
    hidden_size: int
    """Of the model: weighs attention against the rest in the cost of a pair."""

    def __post_init__(self) -> None:
        if self.num_steps == 0:
            raise ConfigError(
                f"There are {len(self.index)} training pairs and train.epochs={self.epochs}, which does not fill one "
                f"step of train.global_batch_size={self.global_batch_size}. Lower the batch size or add data."
            )

    @property
    def num_steps(self) -> int:
        """Steps over all epochs; pairs of the last epoch that do not fill a step are left out."""
        return len(self.index) * self.epochs // self.global_batch_size

    @property
    def shards_per_window(self) -> int:
        """Rows are shuffled within so many shards: at most 16, and of large ones at least two."""
        tokens = sum(self.index.facts.tokens) / len(self.index.shards)
        return int(min(max(_TOKENS_PER_WINDOW // max(1, tokens), 2), _SHARDS_PER_WINDOW))

    def steps(self, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Each step from `start` on, with the row numbers in the index of its pairs, [global_batch_size]."""
        windows = self._windows(start * self.global_batch_size)
        rest = next(windows)
        for step in range(start, self.num_steps):
            while len(rest) < self.global_batch_size:
                rest = np.concatenate((rest, next(windows)))
            yield step, rest[: self.global_batch_size]
            rest = rest[self.global_batch_size :]

    def left_out(self) -> np.ndarray:
        """Row numbers of the pairs at the end of the last epoch that fill no step, [fewer than global_batch_size]."""
        missing = len(self.index) * self.epochs - self.num_steps * self.global_batch_size
        found: list[np.ndarray] = []
        windows = self._windows(self.num_steps * self.global_batch_size)
        while sum(map(len, found)) < missing:
            found.append(next(windows))
        rows: np.ndarray = np.concatenate([np.zeros(0, dtype=np.int64), *found])[:missing]
        return rows

    def _windows(self, skip: int) -> Iterator[np.ndarray]:
        """The pairs in their order, epoch after epoch without end, in pieces that are shuffled in themselves.

        Args:
            skip: pairs at the beginning that are passed over.
        """
        offsets, size = self.index.offsets, self.shards_per_window
        first_epoch, skip = divmod(skip, len(self.index))
        for epoch in itertools.count(first_epoch):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.index.shards))
            starts = np.arange(0, len(order), size)
            ends = np.cumsum(np.add.reduceat(np.diff(offsets)[order], starts))
            for window in range(int(np.searchsorted(ends, skip, side="right")), len(starts)):
                shards = order[starts[window] : starts[window] + size]
                pairs = np.concatenate([np.arange(offsets[shard], offsets[shard + 1]) for shard in shards])
                shuffled = np.random.default_rng([self.seed, epoch, window]).permutation(pairs)
                yield shuffled[max(0, skip - (int(ends[window]) - len(pairs))) :]
            skip = 0

    def microbatches(self, rows: np.ndarray, world_size: int, tokens_per_microbatch: int) -> list[list[list[int]]]:
        """The rows of a step, spread: rank → micro-batch → rows. Every rank has at least one pair."""
        return microbatches(self.index, rows, world_size, tokens_per_microbatch, self.hidden_size)


def microbatches(
    index: PlanIndex, rows: np.ndarray, world_size: int, tokens_per_microbatch: int, hidden_size: int
) -> list[list[list[int]]]:
    """Rows of the index, spread: rank → micro-batch → rows, equal in cost as far as they go.

    Every rank has the same number of micro-batches, for under FSDP ranks gather weights together in each. A rank with
    fewer pairs than that has empty ones.
    """
    lengths = index.lengths[rows]
    tokens = lengths.sum(axis=1)
    shares = [
        [[share[i] for i in group] for group in first_fit(tokens[share], tokens_per_microbatch)]
        for share in spread(pair_cost(lengths, hidden_size), world_size)
    ]
    count = max(map(len, shares))
    return [[[int(rows[i]) for i in group] for group in split_up(share, tokens, count)] for share in shares]


def pair_cost(lengths: np.ndarray, hidden_size: int) -> np.ndarray:
    """Relative cost of pairs whose prompt is computed once: tokens, and attention growing with the sequence.

    lengths: [n, 3] tokens of prompt, chosen, rejected. Returns [n] floats.
    From FLOPs per token of a decoder layer, 24 H² for its matrices and 2 H S for causal attention over S tokens.
    """
    prompt, chosen, rejected = lengths.T.astype(np.float64)
    whole, other = prompt + chosen, prompt + rejected
    attention = whole * whole + rejected * (other + prompt)
    cost: np.ndarray = lengths.sum(axis=1) + attention / (12 * hidden_size)
    return cost


def make_plan(output: Location, config: Config, rows: Artifact) -> tuple[StepPlan, PlanIndex]:
    """The step plan of a configuration over its rows, and the index of the held-out ones.

    output: the folder run.output, which keeps the index.

    Raises ConfigError where the plan has no step, or where held-out pairs are asked for and there are none; DataError
    where rows lack an answer that the loss needs.
    """
    model_config = ModelFolder.of(config.model).config()
    trained, held_out = index_of(output, rows, config.train.eval_fraction)
    plan = StepPlan(
        index=trained,
        global_batch_size=config.train.global_batch_size,
        epochs=config.train.epochs,
        seed=config.run.seed,
        hidden_size=model_config.get("hidden_size") or model_config.get("n_embd") or 1024,
    )
    loss = config.train.loss
    if plan.index.num_unpaired and not loss.accepts_unpaired:
        raise DataError(
            f"{plan.index.num_unpaired} of the {len(plan.index)} training rows of {rows.location} have one answer, "
            f"and train.loss.type={loss.type} compares two. Set train.loss.type=kto, or train on pairs."
        )
    steering = {config.train.keep_best, config.train.early_stopping and config.train.early_stopping.metric}
    if held_out.num_unpaired == len(held_out) and steering & {"eval_rewards/accuracies", "eval_rewards/margins"}:
        raise ConfigError(
            "train.keep_best or train.early_stopping goes by a comparison of two answers, but held-out rows have one "
            "answer each: go by eval_loss, or name pairs as data.eval."
        )
    if config.train.eval_every_steps is not None and not len(held_out):
        raise ConfigError(
            f"train.eval_every_steps is {config.train.eval_every_steps}, but there is no held-out pair"
            f"{f' in train.eval_fraction={config.train.eval_fraction:g} of them' * (config.train.eval_fraction < 1)}: "
            "raise data.held_out_fraction, name data.eval, or leave train.eval_every_steps out."
        )
    return plan, held_out
