"""The step plan: which pairs make up which optimizer step, and how a step is spread over ranks.

The plan is computed from the index of the rows (dpo_ray.training.index) and a seed, and depends neither on time nor
on the number of workers: step t is the same global_batch_size pairs whoever computes it. Resuming at step t is
starting the plan at t.

Without weights each pair comes once an epoch. With weights each step has of each source its share, and an epoch is as
many pairs as all sources hold together: each source is gone through pass after pass, by itself, as fast as its share
has it. That is what MosaicML's Streaming does with proportions and stratified batches. (interleave_datasets of Hugging
Face ends at the first source that is exhausted, or at the last: an epoch then depends on the most extreme weight.)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from dpo_ray.bins import first_fit, split_up, spread
from dpo_ray.config import Config
from dpo_ray.config.losses import require_use
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from dpo_ray.training.index import PlanIndex, index_of
from dpo_ray.training.mixture import Mixture

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
    weights: Mapping[str, float] | None = None
    """Source → its weight; None: each pair comes once an epoch."""

    def __post_init__(self) -> None:
        self._require_sources()
        if self.num_steps == 0:
            raise ConfigError(
                f"There are {len(self.index)} training pairs and train.epochs={self.epochs}, which does not fill one "
                f"step of train.global_batch_size={self.global_batch_size}. Lower the batch size or add data."
            )

    def _require_sources(self) -> None:
        """Raises DataError where the index has not a pair of each weighted source, and of these alone."""
        if self.weights is None:
            return
        there = self.index.by_source()
        for source in self.weights:
            if not there.get(source):
                raise DataError(
                    f"The source {source} of data.train has a weight of {self.weights[source]:g}, but no pair of it is "
                    "left to train on: its rows were bad, held out, too long, or duplicates of sources before it. The "
                    "data report counts them; mend the source, or leave it out."
                )
        if others := len(self.index) - sum(there[source] for source in self.weights):
            raise DataError(
                f"{others} training pairs are of no source that data.train gives a weight to, so that their share is "
                "not known: train on rows that were made with this data.train."
            )

    @property
    def num_steps(self) -> int:
        """Steps over all epochs; pairs of the last epoch that do not fill a step are left out."""
        return len(self.index) * self.epochs // self.global_batch_size

    @property
    def shards_per_window(self) -> int:
        """Rows are shuffled within so many shards: at most 16, and of large ones at least two. With weights these are
        of one source, and fewer, because each source has a window of its own."""
        tokens = sum(self.index.facts.tokens) / len(self.index.shards)
        streams = self._num_streams
        most = max(_SHARDS_PER_WINDOW // streams, 2)
        return int(min(max(_TOKENS_PER_WINDOW // streams // max(1, tokens), 2), most))

    @property
    def shards_at_once(self) -> int:
        """Shards that the pairs of a step lie in, at most, but for a step that goes from one window to the next."""
        return self.shards_per_window * self._num_streams

    @property
    def _num_streams(self) -> int:
        return 1 if self.weights is None else len(self.weights)

    def steps(self, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Each step from `start` on, with the row numbers in the index of its pairs, [global_batch_size]."""
        before = self.taken(start * self.global_batch_size)
        streams = {source: _Stream(self._windows(source, skip)) for source, skip in before.items()}
        for step in range(start, self.num_steps):
            until = self.taken((step + 1) * self.global_batch_size)
            yield step, np.concatenate([stream.take(until[s] - before[s]) for s, stream in streams.items()])
            before = until

    def taken(self, count: int) -> dict[str | None, int]:
        """Source → its pairs among the first `count` pairs of the training; without weights all are of None."""
        if self.weights is None:
            return {None: count}
        found: dict[str | None, int] = {}
        found.update(Mixture(self.weights).taken(count))
        return found

    def trained(self) -> dict[str, dict[str, float]]:
        """Source → its `pairs`, its `share` of all steps, and `passes`, how often each of its pairs comes."""
        there, total = self.index.by_source(), self.num_steps * self.global_batch_size
        weighted = self.taken(total)
        # Without weights, those that fill no step at the end are left out of this.
        taken = {source: weighted.get(source, count * self.epochs) for source, count in there.items()}
        everything = sum(taken.values())
        return {
            source: {"pairs": count, "share": taken[source] / everything, "passes": taken[source] / count}
            for source, count in there.items()
            if count
        }

    def left_out(self) -> np.ndarray:
        """Row numbers of the pairs at the end of the last epoch that fill no step, [fewer than global_batch_size].
        They are known of a training without weights, in which all others come."""
        missing = len(self.index) * self.epochs - self.num_steps * self.global_batch_size
        return _Stream(self._windows(None, self.num_steps * self.global_batch_size)).take(missing)

    def _windows(self, source: str | None, skip: int) -> Iterator[np.ndarray]:
        """The pairs of a source, or all, in their order, pass after pass without end, in pieces that are shuffled in
        themselves.

        Args:
            skip: pairs at the beginning that are passed over.
        """
        offsets, size = self.index.offsets, self.shards_per_window
        shards = np.arange(len(self.index.shards)) if source is None else self.index.shards_of(source)
        # A source keeps its order where others come or go.
        seed = [self.seed] if source is None else [self.seed, int(hashlib.sha256(source.encode()).hexdigest()[:8], 16)]
        counts = np.diff(offsets)
        first_pass, skip = divmod(skip, int(counts[shards].sum()))
        for number in itertools.count(first_pass):
            order = shards[np.random.default_rng([*seed, number]).permutation(len(shards))]
            starts = np.arange(0, len(order), size)
            ends = np.cumsum(np.add.reduceat(counts[order], starts))
            for window in range(int(np.searchsorted(ends, skip, side="right")), len(starts)):
                pairs = self.index.pairs_of(order[starts[window] : starts[window] + size])
                shuffled = np.random.default_rng([*seed, number, window]).permutation(pairs)
                yield shuffled[max(0, skip - (int(ends[window]) - len(pairs))) :]
            skip = 0

    def microbatches(self, rows: np.ndarray, world_size: int, tokens_per_microbatch: int) -> list[list[list[int]]]:
        """The rows of a step, spread: rank → micro-batch → rows. Every rank has at least one pair."""
        return microbatches(self.index, rows, world_size, tokens_per_microbatch, self.hidden_size)


class _Stream:
    """Takes as many pairs at once as are asked for from pieces of any size."""

    def __init__(self, pieces: Iterator[np.ndarray]) -> None:
        self._pieces = pieces
        self._rest = np.zeros(0, dtype=np.int64)

    def take(self, count: int) -> np.ndarray:
        while len(self._rest) < count:
            self._rest = np.concatenate((self._rest, next(self._pieces)))
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


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
        weights=config.data.weights,
    )
    loss = config.train.loss
    for name in (*trained.facts.says, *held_out.facts.says):
        require_use(loss, name, f"Rows of {rows.location} have")
    if plan.index.num_unpaired and not loss.accepts_unpaired:
        raise DataError(
            f"{plan.index.num_unpaired} of the {len(plan.index)} training rows of {rows.location} have one answer, "
            f"and train.loss.type={loss.type} compares two. Set train.loss.type=kto, or train on pairs."
        )
    steering = {config.train.keep_best, config.train.early_stopping and config.train.early_stopping.metric}
    if 0 < held_out.num_unpaired == len(held_out) and steering & {"eval_rewards/accuracies", "eval_rewards/margins"}:
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
