"""The step plan as a Ray Data stream: each training worker receives its share of each step, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, islice
from typing import Any

import pyarrow as pa
import ray.data
import ray.train

from dpo_ray.artifacts import read_shard
from dpo_ray.on_ray.session import quiet_data
from dpo_ray.pairs import REFERENCE, tokenized_pair
from dpo_ray.plan import StepPlan
from dpo_ray.storage import Location
from dpo_ray.train_loop import Step

_STEPS_PER_BLOCK = 8  # Ray pays for each block; eight steps hide that, and are little to read ahead

_FEED = pa.schema([("rank", pa.int32()), ("step", pa.int32()), ("microbatch", pa.int32()), *REFERENCE])


def step_blocks(plan: StepPlan, start: int, world_size: int, tokens_per_microbatch: int) -> Iterator[dict[str, str]]:
    """Descriptors of the steps from `start` on, one block each: ranks take turns, in groups of steps."""
    steps = plan.steps(start)
    while group := list(islice(steps, _STEPS_PER_BLOCK)):
        shares = [(step, plan.microbatches(rows, world_size, tokens_per_microbatch)) for step, rows in group]
        for rank in range(world_size):
            places = [
                (step, number, plan.index.shards[plan.index.shard[row]], int(plan.index.row[row]))
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
    return ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
        fetch_block, batch_size=1, batch_format="pyarrow", num_cpus=0.5
    )


def fetch_block(batch: pa.Table) -> pa.Table:
    """Descriptor → the rows that it names."""
    block = json.loads(batch["block"][0].as_py())
    rows: list[dict[str, Any]] = [
        {"rank": block["rank"], "step": step, "microbatch": number, **_shard(uri).slice(row, 1).to_pylist()[0]}
        for step, number, uri, row in block["places"]
    ]
    return pa.Table.from_pylist(rows, schema=_FEED)


@lru_cache(maxsize=32)
def _shard(uri: str) -> pa.Table:
    return read_shard(Location(uri))


class StepFeed(ray.train.DataConfig):
    """Hands block k to rank k mod W: whole blocks, in order, whoever asks first."""

    def __init__(self) -> None:
        options = ray.data.ExecutionOptions(preserve_order=True)
        super().__init__(execution_options=options, enable_shard_locality=False)

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> Any:
        shares: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            ordered = dataset.copy(dataset)
            ordered.context.execution_options = self._resolve_execution_options(name)
            ordered.context.enable_progress_bars = False
            # A step may take longer than Ray Data's patience with a slow consumer.
            ordered.context.execution_no_progress_timeout_s = -1
            # equal=True would cut blocks apart to even out rows, and drop what is left over.
            for rank, split in enumerate(ordered.streaming_split(world_size, equal=False, locality_hints=None)):
                shares[rank][name] = split
        return shares


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
        microbatches = [
            [tokenized_pair(row) for row in group] for _, group in groupby(members, key=lambda row: row["microbatch"])
        ]
        yield Step(number=number, microbatches=microbatches)
