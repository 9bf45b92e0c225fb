"""The step plan: which pairs make up which optimizer step, and how a step is spread over ranks.

The plan is computed from a light index of the reference artifact and a seed, and depends neither on time nor
on the number of workers: step t is the same global_batch_size pairs whoever computes it. Resuming at step t is
starting the plan at t.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from dpo_ray.errors import ConfigError, DataError
from dpo_ray.storage.artifact import read_shard
from dpo_ray.storage.location import Location

_SHARDS_PER_WINDOW = 16  # rows are shuffled within so many shards, so that a step reads few files


@dataclass(frozen=True)
class PlanIndex:
    """Where each pair of one split lies, and its token counts. n pairs, in the order of the shards."""

    shards: tuple[str, ...]
    shard: np.ndarray
    """[n] which of the shards"""
    row: np.ndarray
    """[n] row in the shard"""
    lengths: np.ndarray
    """[n, 3] tokens of prompt, chosen and rejected; 0 for a side that an unpaired row lacks"""
    duplicates: int
    """Pairs left out because an earlier row is the same pair."""
    read: int
    """Rows seen, of both sides."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def num_unpaired(self) -> int:
        """Rows that lack a side: no loss that compares two answers can learn from them."""
        return int((self.lengths[:, 1:] == 0).any(axis=1).sum())


_INDEXED = ["pair_id", "prompt_id", "split", "prompt_ids", "chosen_ids", "rejected_ids"]


def build_index(shards: Iterable[Location], split: str) -> PlanIndex:
    """Read ids and token counts, shard by shard. Raises DataError where a prompt is on both sides of the split."""
    names, shard_of, rows, lengths = [], [], [], []
    seen: set[str] = set()
    sides: dict[str, str] = {}
    duplicates = read = 0
    for number, location in enumerate(shards):
        table = read_shard(location, columns=_INDEXED)
        names.append(location.uri)
        read += table.num_rows
        counts = np.stack(
            [pc.list_value_length(table[c]).to_numpy() for c in ("prompt_ids", "chosen_ids", "rejected_ids")], axis=1
        )
        columns = (table[c].to_pylist() for c in ("pair_id", "prompt_id", "split"))
        for i, (pair_id, prompt_id, side) in enumerate(zip(*columns, strict=True)):
            if sides.setdefault(prompt_id, side) != side:
                raise DataError(
                    f"Prompt {prompt_id} is both in the training and in the held-out data ({location}), so held-out "
                    "accuracy would be flattered. Remove its pairs from data.eval or from data.train."
                )
            if side != split:
                continue
            if pair_id in seen:
                duplicates += 1
                continue
            seen.add(pair_id)
            shard_of.append(number)
            rows.append(i)
            lengths.append(counts[i])
    return PlanIndex(
        shards=tuple(names),
        shard=np.array(shard_of, dtype=np.int32),
        row=np.array(rows, dtype=np.int32),
        lengths=np.array(lengths, dtype=np.int32).reshape(-1, 3),
        duplicates=duplicates,
        read=read,
    )


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

    def steps(self, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Each step from `start` on, with the row numbers in the index of its pairs, [global_batch_size]."""
        n = len(self.index)
        first = start * self.global_batch_size
        epoch, rest = first // n, self._epoch_order(first // n)[first % n :]
        for step in range(start, self.num_steps):
            while len(rest) < self.global_batch_size:
                epoch += 1
                rest = np.concatenate((rest, self._epoch_order(epoch)))
            yield step, rest[: self.global_batch_size]
            rest = rest[self.global_batch_size :]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        windows = random.permutation(len(self.index.shards))
        place = np.empty(len(windows), dtype=np.int64)
        place[windows] = np.arange(len(windows)) // _SHARDS_PER_WINDOW
        shuffled = random.permutation(len(self.index))
        return shuffled[np.argsort(place[self.index.shard[shuffled]], kind="stable")]

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
        [[share[i] for i in group] for group in fit(tokens[share], tokens_per_microbatch)]
        for share in spread(pair_cost(lengths, hidden_size), world_size)
    ]
    count = max(map(len, shares))
    return [[[int(rows[i]) for i in group] for group in split_up(share, tokens, count)] for share in shares]


def split_up(groups: list[list[int]], tokens: np.ndarray, count: int) -> list[list[int]]:
    """The groups cut in halves, the largest first, until there are `count`; empty ones where no pair is left to cut.

    tokens: [n] tokens of each item.
    """
    groups = list(groups)
    while len(groups) < count:
        largest = max((g for g in groups if len(g) > 1), key=lambda g: int(tokens[g].sum()), default=[])
        if largest:
            groups.remove(largest)
            groups += [largest[0::2], largest[1::2]]
        else:
            groups.append([])
    return groups


def pair_cost(lengths: np.ndarray, hidden_size: int) -> np.ndarray:
    """Relative cost of pairs whose prompt is computed once: tokens, and attention growing with the sequence.

    lengths: [n, 3] tokens of prompt, chosen, rejected. Returns [n] floats.
    From FLOPs per token of a decoder layer, 24 H² for its matrices and 2 H S for causal attention over S tokens.
    """
    prompt, chosen, rejected = lengths.T.astype(np.float64)
    whole, other = prompt + chosen, prompt + rejected
    attention = whole * whole + rejected * (other + prompt)
    return lengths.sum(axis=1) + attention / (12 * hidden_size)


def spread(costs: np.ndarray, num_ranks: int) -> list[list[int]]:
    """Longest processing time first: items → ranks, nearly equal in cost. Deterministic."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        shares[rank].append(item)
        loads[rank] += float(costs[item])
    return shares


def fit(tokens: Sequence[int] | np.ndarray, limit: int) -> list[list[int]]:
    """First fit, longest first: items → groups of at most `limit` tokens; a longer item has a group of its own."""
    groups: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(tokens)), key=lambda i: (-int(tokens[i]), i)):
        size = int(tokens[item])
        for g, left in enumerate(room):
            if size <= left:
                groups[g].append(item)
                room[g] -= size
                break
        else:
            groups.append([item])
            room.append(limit - size)
    return groups
