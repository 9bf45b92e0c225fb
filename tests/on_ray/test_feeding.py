"""The training feed: each rank gets its share of each step in order, whatever the lengths and the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo_ray.artifacts import write_shard
from dpo_ray.on_ray.feeding import TRAIN, StepFeed, fetch_block, received_steps, step_blocks
from dpo_ray.pairs import REFERENCE
from dpo_ray.plan import StepPlan, build_index
from dpo_ray.storage import Location

BATCH = 16
TOKENS = 800
NUM_SHARDS = 4

Ids = list[list[str]]
"""Micro-batches of pair ids."""


def row(number: int, lengths: Sequence[int]) -> dict:
    """A row whose values follow from its number."""
    prompt, chosen, rejected = ([number % 1000] * n for n in lengths)
    return {
        "pair_id": f"pair-{number}",
        "prompt_id": f"prompt-{number}",
        "split": "train",
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "chosen_ref_logprobs": [-number / 8] * len(chosen),
        "rejected_ref_logprobs": [-number / 4] * len(rejected),
    }


def shards(folder: Path, num_pairs: int) -> list[Location]:
    """Pairs of log-normal lengths, from 4 tokens to 400 a part."""
    lengths = np.random.default_rng(3).lognormal(3.5, 1.2, size=(num_pairs, 3)).clip(4, 400).astype(int)
    assert lengths.max() == 100 * lengths.min()
    rows = [row(number, of_row.tolist()) for number, of_row in enumerate(lengths)]
    made = []
    for number in range(NUM_SHARDS):
        made.append(Location.of(folder) / f"shard-{number}.parquet")
        write_shard(made[-1], pa.Table.from_pylist(rows[number::NUM_SHARDS], schema=REFERENCE), {})
    return made


@pytest.fixture(scope="module")
def make_plan(tmp_path_factory: pytest.TempPathFactory):
    """make_plan(num_steps, batch=…): a plan over 320 pairs of very different lengths."""
    index = build_index(shards(tmp_path_factory.mktemp("feeding"), 320), "train")

    def make(num_steps: int, batch: int = BATCH) -> StepPlan:
        plan = StepPlan(index, batch, epochs=-(-num_steps * batch // len(index)), seed=5, hidden_size=64)
        assert plan.num_steps >= num_steps
        return plan

    return make


def pair_ids(plan: StepPlan) -> list[str]:
    """Of each row of the index."""
    index = plan.index
    return [f"pair-{row * NUM_SHARDS + shard}" for shard, row in zip(index.shard, index.row, strict=True)]


@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8, 16])
def test_rays_splitter_sends_every_block_to_the_rank_that_it_is_for(make_plan, world_size: int, batch: int):
    from ray.data import DataContext
    from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
    from ray.data._internal.execution.operators.output_splitter import OutputSplitter

    context = DataContext.get_current()
    splitter = OutputSplitter(InputDataBuffer(context, []), world_size, equal=False, data_context=context)
    for number, descriptor in enumerate(step_blocks(make_plan(120, batch), 0, world_size, TOKENS)):
        block = fetch_block(pa.Table.from_pylist([descriptor]))
        (rank,) = set(block["rank"].to_pylist())
        given = splitter._select_next_output_index()
        assert given == rank, f"block {number}, of step {block['step'][0]}, is for rank {rank} and went to {given}"
        splitter._num_output[given] += block.num_rows


@pytest.fixture(scope="module")
def busy_ray() -> Iterator[None]:
    """A Ray whose two CPUs are taken, as they are by workers in training."""
    import ray

    from dpo_ray.on_ray.session import quiet_data

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300 << 20)
    quiet_data()

    @ray.remote(num_cpus=2)
    class Worker:
        def ready(self) -> None: ...

    worker = Worker.remote()
    ray.get(worker.ready.remote())
    yield
    ray.shutdown()


def received(plan: StepPlan, world_size: int, *, fed_from: int, start: int, stop: int) -> list[list[tuple[int, Ids]]]:
    """What each rank gets of the steps from `start` up to `stop`: rank → step → micro-batches of pair ids."""
    splits = StepFeed(plan, TOKENS, lambda: fed_from).configure({}, world_size, None, None)

    def consume(rank: int) -> list[tuple[int, Ids]]:
        steps = islice(received_steps(splits[rank][TRAIN], rank, start), stop - start)
        return [(s.number, [[pair.pair_id for pair in batch] for batch in s.share.microbatches]) for s in steps]

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(consume, range(world_size)))


def planned(plan: StepPlan, world_size: int, start: int, stop: int) -> list[list[tuple[int, Ids]]]:
    """The same as the plan says."""
    ids = pair_ids(plan)
    shares = [(step, plan.microbatches(rows, world_size, TOKENS)) for step, rows in plan.steps(start) if step < stop]
    return [
        [(step, [[ids[row] for row in batch] for batch in share[rank]]) for step, share in shares]
        for rank in range(world_size)
    ]


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_receive_exactly_the_plan_through_a_resume_and_a_change_of_workers(busy_ray, make_plan, world_size: int):
    plan = make_plan(400)
    seen: list[str] = []
    other = {2: 3, 3: 8, 8: 2}[world_size]
    # Begun; resumed at 201 from a feed that starts earlier; gone on with by another number of workers.
    for workers, fed_from, start, stop in [
        (world_size, 0, 0, 201),
        (world_size, 190, 201, 301),
        (other, 301, 301, plan.num_steps),
    ]:
        got = received(plan, workers, fed_from=fed_from, start=start, stop=stop)
        assert got == planned(plan, workers, start, stop)
        for steps in zip(*got, strict=True):
            seen += [pair for _, batches in steps for batch in batches for pair in batch]
    ids = pair_ids(plan)
    # Over the ranks, step by step: all pairs of the plan, and each once.
    for step, rows in plan.steps():
        assert sorted(seen[step * BATCH : (step + 1) * BATCH]) == sorted(ids[row] for row in rows)
    assert len(seen) == plan.num_steps * BATCH
