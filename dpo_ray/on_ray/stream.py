"""The step plan as a Ray Data stream: each training worker receives its share of each step, in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train

from dpo_ray.on_ray.session import quiet_data
from dpo_ray.pairs import MISMATCHED, TokenizedPair, tokenized_pair
from dpo_ray.storage.artifact import read_shard
from dpo_ray.storage.location import Location
from dpo_ray.training.batch import Share, Step
from dpo_ray.training.plan import PlanIndex, StepPlan
from dpo_ray.training.plan import microbatches as spread_rows

TRAIN = "train"
"""Name of the stream among Ray Train's data sets."""

_FETCHERS = 2
_STEPS_PER_BLOCK = 8  # Ray pays for each block; eight steps hide that, and are little to read ahead

_FEED = pa.schema(
    [
        ("rank", pa.int32()),
        ("step", pa.int32()),
        ("num_microbatches", pa.int32()),
        ("microbatch", pa.int32()),
        *MISMATCHED,
    ]
)


def step_blocks(plan: StepPlan, start: int, world_size: int, tokens_per_microbatch: int) -> Iterator[dict[str, str]]:
    """Descriptors of the steps from `start` on, one block each: ranks take turns, in groups of steps."""
    steps = plan.steps(start)
    while group := list(islice(steps, _STEPS_PER_BLOCK)):
        shares = [(step, plan.microbatches(rows, world_size, tokens_per_microbatch)) for step, rows in group]
        for rank in range(world_size):
            places = [
                (step, len(share[rank]), number, plan.index.shards[plan.index.shard[row]], int(plan.index.row[row]))
                for step, share in shares
                for number, rows in enumerate(share[rank])
                for row in rows
            ]
            yield {"block": json.dumps({"rank": rank, "places": places})}


def feed_dataset(plan: StepPlan, start: int, world_size: int, tokens_per_microbatch: int) -> ray.data.Dataset:
    """The stream of pairs of the steps from `start` on, one block a rank and group of steps."""
    quiet_data()  # Ray Train calls this in a process of its own
    blocks = list(step_blocks(plan, start, world_size, tokens_per_microbatch))
    # A finished run that is asked again has no steps left, but Ray wants a data set all the same.
    blocks = blocks or [{"block": json.dumps({"rank": 0, "places": []})}]
    # It claims no CPU of its own: workers may have taken them all, elastic ones whatever there is, and would then wait
    # for a feed that waits for them. Two tasks at a time are little work beside a training step.
    return ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
        fetch_block,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,
        max_retries=3,  # not for ever, where the process dies of what it reads
        compute=ray.data.TaskPoolStrategy(size=_FETCHERS),
    )


def fetch_block(batch: pa.Table) -> pa.Table:
    """Descriptor → the rows that it names."""
    block = json.loads(batch["block"][0].as_py())
    rows: list[dict[str, Any]] = [
        {"rank": block["rank"], "step": step, "num_microbatches": count, "microbatch": number, **_row(uri, row)}
        for step, count, number, uri, row in block["places"]
    ]
    return pa.Table.from_pylist(rows, schema=_FEED)


def _row(uri: str, row: int) -> dict[str, Any]:
    return _shard(uri).slice(row, 1).to_pylist()[0]


@lru_cache(maxsize=32)
def _shard(uri: str) -> pa.Table:
    return read_shard(Location(uri))


class StepFeed(ray.train.DataConfig):
    """Makes the stream for the workers that there are, and hands block k to rank k mod W.

    Ray Train asks for it whenever it starts a group of workers, which after a failure may be fewer or more than
    before. The stream then begins at the step that was reached.
    """

    def __init__(self, plan: StepPlan, tokens_per_microbatch: int, reached: Callable[[], int]) -> None:
        super().__init__(execution_options=ray.data.ExecutionOptions(preserve_order=True), enable_shard_locality=False)
        self.plan = plan
        self.tokens_per_microbatch = tokens_per_microbatch
        self.reached = reached

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> Any:
        ordered = feed_dataset(self.plan, self.reached(), world_size, self.tokens_per_microbatch)
        ordered.context.execution_options = self._resolve_execution_options(TRAIN)
        ordered.context.enable_progress_bars = False
        # A step may take longer than Ray Data's patience with a slow consumer.
        ordered.context.execution_no_progress_timeout_s = -1
        # equal=True would cut blocks apart to even out rows, and drop what is left over.
        return [{TRAIN: split} for split in ordered.streaming_split(world_size, equal=False, locality_hints=None)]


def placeholder() -> ray.data.Dataset:
    """What Ray Train is given by name, so that it asks StepFeed, which alone knows how many workers there are."""
    return ray.data.from_items([{"block": ""}])


def received_steps(shard: Any, rank: int, start: int) -> Iterator[Step]:
    """The steps of one rank from its share of the stream, earlier steps than `start` passed over.

    Raises RuntimeError where a block of another rank or an unexpected step arrives: training on would be wrong.
    """
    expected = start
    rows = (row for batch in shard.iter_batches(batch_size=None, batch_format="pyarrow") for row in batch.to_pylist())
    for number, of_step in groupby(rows, key=lambda row: row["step"]):
        members = list(of_step)
        if any(row["rank"] != rank for row in members):
            raise RuntimeError(f"rank {rank} was given step {number} of rank {members[0]['rank']}")
        if number < start:
            continue
        if number != expected:
            raise RuntimeError(f"rank {rank} expected step {expected}, but was given step {number}")
        expected += 1
        microbatches: list[list[TokenizedPair]] = [[] for _ in range(members[0]["num_microbatches"])]
        for row in members:
            microbatches[row["microbatch"]].append(tokenized_pair(row))
        pairs = [pair for microbatch in microbatches for pair in microbatch]
        yield Step(number, Share(microbatches, filler=min(pairs, key=lambda pair: pair.num_tokens)))


def read_share(
    index: PlanIndex, rows: np.ndarray, rank: int, world_size: int, tokens_per_microbatch: int, hidden_size: int
) -> Share:
    """A rank's share of some rows of the index, read at once: for few pairs that are used again and again."""
    mine = spread_rows(index, rows, world_size, tokens_per_microbatch, hidden_size)[rank]

    def pair(row: int) -> TokenizedPair:
        return tokenized_pair(_row(index.shards[index.shard[row]], int(index.row[row])))

    shortest = int(rows[np.argmin(index.lengths[rows].sum(axis=1))])
    return Share([[pair(row) for row in group] for group in mine], filler=pair(shortest))
