"""The training feed: each rank gets its share of each step in order, whatever the lengths and the number of ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_ray.errors import DataError
from dpo_ray.on_ray import stream
from dpo_ray.on_ray.failures import raise_ours
from dpo_ray.on_ray.session import quiet_data
from dpo_ray.on_ray.stream import TRAIN, StepFeed, group_size, received_steps, share_blocks
from dpo_ray.pairs import REFERENCE
from dpo_ray.storage.location import Location
from dpo_ray.training.batch import Step
from dpo_ray.training.index import PlanIndex
from dpo_ray.training.plan import StepPlan
from tests.command_line import processes_below
from tests.indexed import indices, with_lengths

BATCH = 16
TOKENS = 800  # of a micro-batch
HIDDEN = 64

PairIds = list[list[str]]
"""Of the micro-batches of a step."""


def shards(num_pairs: int, num_shards: int) -> list[pa.Table]:
    """Pairs of log-normal lengths, from 4 tokens to 400 a part; the values of a row follow from its number."""
    lengths = np.random.default_rng(3).lognormal(3.5, 1.2, size=(num_pairs, 3)).clip(4, 400).astype(int)
    assert lengths.max() == 100 * lengths.min()
    rows = [
        {
            "pair_id": f"pair-{number}",
            "prompt_id": f"prompt-{number}",
            "split": "train",
            "prompt_ids": [number] * prompt,
            "chosen_ids": [number + 1] * chosen,
            "rejected_ids": [number + 2] * rejected,
            "chosen_ref_logprobs": [-number / 8] * chosen,
            "rejected_ref_logprobs": [-number / 4] * rejected,
        }
        for number, (prompt, chosen, rejected) in enumerate(lengths.tolist())
    ]
    return [with_lengths(rows[number::num_shards], REFERENCE) for number in range(num_shards)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> PlanIndex:
    return indices(tmp_path_factory.mktemp("feeding"), shards(320, num_shards=4))[0]


def plan_over(index: PlanIndex, num_steps: int, batch: int = BATCH) -> StepPlan:
    """A plan of so many steps or, to the end of an epoch, a few more."""
    return StepPlan(index, batch, epochs=-(-num_steps * batch // len(index)), seed=5, hidden_size=HIDDEN)


def pair_ids(index: PlanIndex) -> list[str]:
    """Of each row of the index."""
    places = zip(index.shard_of(np.arange(len(index))).tolist(), index.row.tolist(), strict=True)
    return [f"pair-{row * len(index.shards) + shard}" for shard, row in places]


def planned(plan: StepPlan, world_size: int, start: int, stop: int) -> list[list[tuple[int, PairIds]]]:
    """What each rank should get of the steps from `start` up to `stop`: rank → step → micro-batches."""
    ids = pair_ids(plan.index)
    shares = [
        (step, plan.microbatches(rows, world_size, TOKENS)) for step, rows in islice(plan.steps(start), stop - start)
    ]
    return [
        [(step, [[ids[row] for row in batch] for batch in share[rank]]) for step, share in shares]
        for rank in range(world_size)
    ]


def names(step: Step) -> tuple[int, PairIds]:
    return step.number, [[pair.pair_id for pair in batch] for batch in step.share.microbatches]


def blocks(plan: StepPlan, world_size: int, start: int = 0) -> Iterator[pa.Table]:
    return share_blocks(
        plan,
        start,
        plan.num_steps,
        steps_per_group=group_size(plan),
        world_size=world_size,
        tokens_per_microbatch=TOKENS,
    )


class Shard:
    """Blocks in memory, read as the workers read theirs."""

    def __init__(self, given: Sequence[pa.Table]) -> None:
        self.given = given

    def iter_batches(self, *, batch_size: None, batch_format: str) -> Iterator[pa.Table]:
        return iter(self.given)


@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8, 16])
def test_rays_splitter_sends_every_block_to_the_rank_that_it_is_for(index: PlanIndex, world_size: int, batch: int):
    from ray.data import DataContext
    from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
    from ray.data._internal.execution.operators.output_splitter import OutputSplitter

    context = DataContext.get_current()
    splitter = OutputSplitter(InputDataBuffer(context, []), world_size, equal=False, data_context=context)
    for number, block in enumerate(blocks(plan_over(index, 120, batch), world_size)):
        (rank,), (step,) = block["rank"].to_pylist(), block["step"].to_pylist()
        given = splitter._select_next_output_index()
        assert given == rank, f"block {number}, from step {step} on, is for rank {rank} and went to {given}"
        splitter._num_output[given] += block.num_rows


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_shares_of_a_mixture_know_the_weight_of_the_whole_batch(tmp_path: Path, world_size: int):
    tables = []
    for number, table in enumerate(shards(320, num_shards=4)):
        source = ["math", "chat"][number // 2]
        rows = [row | {"weight": 0.5 + n % 3, "source": source} for n, row in enumerate(table.to_pylist())]
        tables.append(pa.Table.from_pylist(rows, schema=REFERENCE))
    index, _ = indices(tmp_path, tables)
    plan = StepPlan(index, BATCH, 2, 5, HIDDEN, {"math": 3, "chat": 1})
    every = list(blocks(plan, world_size))
    received = [
        list(received_steps(Shard(every[rank::world_size]), rank, 0, plan.num_steps)) for rank in range(world_size)
    ]
    for of_ranks in zip(*received, strict=True):
        pairs = [pair for step in of_ranks for pair in step.share.pairs]
        assert {step.share.batch_weight for step in of_ranks} == {sum(pair.weight for pair in pairs)}
        assert [sum(pair.source == name for pair in pairs) for name in ("math", "chat")] == [12, 4]


def test_a_share_holds_what_is_in_its_rows(index: PlanIndex):
    plan = plan_over(index, 20)
    for rank in (0, 1):
        mine = Shard(list(blocks(plan, 2))[rank::2])
        steps = list(received_steps(mine, rank, 0, plan.num_steps))
        assert [names(step) for step in steps] == planned(plan, 2, 0, plan.num_steps)[rank]
        for pair in (pair for step in steps for pair in step.share.pairs):
            number = int(pair.pair_id.removeprefix("pair-"))
            assert (set(pair.prompt_ids), set(pair.chosen_ids), set(pair.rejected_ids)) == (
                {number}, {number + 1}, {number + 2}
            )  # fmt: skip
            assert pair.chosen_ref_logprobs == [-number / 8] * len(pair.chosen_ids)
            assert pair.rejected_ref_logprobs == [-number / 4] * len(pair.rejected_ids)
            assert pair.mismatched_ids is None and pair.mismatched_ref_logprobs is None


@pytest.mark.parametrize("world_size", [1, 8])
def test_a_group_reads_each_of_its_shards_once(index: PlanIndex, monkeypatch: pytest.MonkeyPatch, world_size: int):
    plan = plan_over(index, 24)
    expected = [block["share"].to_pylist() for block in blocks(plan, world_size)]
    read: list[str] = []
    from_storage = stream._shard

    def uncached(uri: str) -> pa.Table:
        read.append(uri)
        return from_storage(uri)

    monkeypatch.setattr(stream, "_shard", uncached)
    monkeypatch.setattr(stream, "lru_cache", lambda maxsize: lambda read: read)
    for number, block in enumerate(blocks(plan, world_size)):
        assert block["share"].to_pylist() == expected[number]
        if number % world_size == world_size - 1:  # the group is whole
            assert len(read) == len(set(read)) > 1
            read.clear()


def test_steps_before_the_start_are_passed_over(index: PlanIndex):
    plan = plan_over(index, 20)
    mine = Shard(list(blocks(plan, 2, start=3))[1::2])
    assert [s.number for s in received_steps(mine, 1, 13, plan.num_steps)] == list(range(13, plan.num_steps))


def test_a_share_of_another_rank_or_step_is_refused(index: PlanIndex):
    plan = plan_over(index, 20)
    made = list(blocks(plan, 2))

    def receive(*numbers: int, start: int = 0) -> list[Step]:
        return list(received_steps(Shard([made[n] for n in numbers]), 0, start, plan.num_steps))

    with pytest.raises(RuntimeError, match="rank 0 was given the share of rank 1 of the steps from 8 on"):
        receive(0, 3)
    with pytest.raises(RuntimeError, match="rank 0 expected step 8, but was given step 16"):
        receive(0, 4)
    with pytest.raises(RuntimeError, match="rank 0 expected step 8, but was given step 0"):
        receive(0, 0)
    with pytest.raises(RuntimeError, match="rank 0 expected step 6, but was given step 8"):
        receive(2, start=6)
    with pytest.raises(RuntimeError, match="rank 0 expected step 16 of 20, but the stream ended") as caught:
        receive(0, 2)
    assert "the same command goes on from the last one" in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_that_cannot_be_read_are_told_to_every_rank_at_the_same_step(
    index: PlanIndex, monkeypatch: pytest.MonkeyPatch, world_size: int
):
    plan = plan_over(index, 48)
    from_storage, read = stream._shard, Counter()

    def damaged_by_then(uri: str) -> pa.Table:
        read[uri] += 1
        if read[uri] > 2:
            raise DataError(f"{uri} was damaged")
        return from_storage(uri)

    monkeypatch.setattr(stream, "_shard", damaged_by_then)
    monkeypatch.setattr(stream, "lru_cache", lambda maxsize: lambda read: read)
    every = list(blocks(plan, world_size))
    for rank in range(world_size):
        reached = []
        with pytest.raises(DataError, match="was damaged"):
            for step in received_steps(Shard(every[rank::world_size]), rank, 0, plan.num_steps):
                reached.append(step.number)
        assert reached == list(range(2 * group_size(plan)))


def test_groups_of_long_pairs_and_large_batches_are_few_steps(index: PlanIndex):
    def size(tokens: int, batch: int) -> int:
        lengths = np.full((256, 3), tokens // 3, dtype=np.int32)
        many = PlanIndex.of(["s"], np.array([0, 256]), np.arange(256, dtype=np.int32), lengths, 256)
        return group_size(StepPlan(many, batch, 1, 0, HIDDEN))

    assert size(300, 16) == 8
    assert size(6000, 64) == 8  # 3 million tokens
    assert size(6000, 128) == 5
    assert size(30000, 128) == 1
    assert size(300000, 128) == 1  # one step is more than a group should have


@pytest.fixture(scope="module")
def busy_ray(no_ray: None) -> Iterator[None]:
    """A Ray whose two CPUs are taken, as they are by workers in training."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300 << 20)
    quiet_data()

    @ray.remote(num_cpus=2)
    class Worker:
        def ready(self) -> None: ...

    worker = Worker.remote()
    ray.get(worker.ready.remote())
    yield
    ray.shutdown()


@pytest.mark.ray
def test_while_workers_compute_the_feed_takes_few_rounds_a_second(
    busy_ray: None, index: PlanIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where a block is ready that there is no room for yet."""
    import ray

    rounds = 0

    class Counted(stream.Unhurried):
        def on_execution_step(self, executor: Any) -> None:
            nonlocal rounds
            rounds += 1
            super().on_execution_step(executor)

    monkeypatch.setattr(stream, "Unhurried", Counted)
    plan = plan_over(index, 400)
    fed = stream.feed_dataset(plan, 0, 2, TOKENS, Location.of(tmp_path))
    room = ray.data.ExecutionResources.for_limits(object_store_memory=200_000)
    fed.context.execution_options = ray.data.ExecutionOptions(preserve_order=True, resource_limits=room)
    blocks = iter(fed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    next(blocks)
    time.sleep(2)  # what may be read ahead is
    before, began = rounds, time.monotonic()
    time.sleep(2)
    assert 0 < rounds - before <= (time.monotonic() - began) / stream._SECONDS_TO_REST + 1
    read = 1 + sum(1 for _ in blocks)
    assert read == 2 * -(-plan.num_steps // group_size(plan))


def splits_of(plan: StepPlan, world_size: int, reached: int) -> list[Any]:
    notes = Location.of(Path(plan.index.shards[0]).parent / "reading")
    made = StepFeed(plan, TOKENS, lambda: reached, notes).configure({}, world_size, None, None)
    return [split[TRAIN] for split in made]


def side_by_side(world_size: int, consume: Callable[[int], Any]) -> list[Any]:
    """What the ranks return, each consuming in a thread of its own."""
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(consume, range(world_size)))


def in_step(
    plan: StepPlan, world_size: int, at: int = -1, do: Callable[[], None] = lambda: None
) -> list[list[tuple[int, PairIds] | str]]:
    """What the ranks receive that wait for each other in every step, as in training; the first rank may be late at one.

    The error that ends the stream, if one does, stands last.
    """
    splits = splits_of(plan, world_size, 0)
    everyone = threading.Barrier(world_size)

    def consume(rank: int) -> list[tuple[int, PairIds] | str]:
        got: list[tuple[int, PairIds] | str] = []
        try:
            for step in received_steps(splits[rank], rank, 0, plan.num_steps):
                got.append(names(step))
                if rank == 0 and step.number == at:
                    time.sleep(3)  # whoever reads ahead has time for it
                    do()
                everyone.wait(60)
        except threading.BrokenBarrierError:
            pass  # another rank met the error, and has it
        except Exception as error:
            everyone.abort()
            with pytest.raises(DataError) as ours:
                raise_ours(error, "train")
            got.append(str(ours.value))
        return got

    return side_by_side(world_size, consume)


@pytest.mark.ray
def test_ranks_receive_exactly_the_plan_through_a_resume_and_changes_of_workers(busy_ray, index: PlanIndex):
    plan = plan_over(index, 700)
    seen: list[str] = []
    # Begun; resumed at 201 from a feed that begins earlier, as checkpoints may; gone on with by more workers, twice.
    for world_size, reached, start, stop in [
        (2, 0, 0, 201),
        (2, 190, 201, 301),
        (3, 301, 301, 501),
        (8, 501, 501, 700),
    ]:
        splits = splits_of(plan, world_size, reached)

        def consume(rank: int, splits=splits, start=start, stop=stop) -> list[tuple[int, PairIds]]:
            steps = received_steps(splits[rank], rank, start, plan.num_steps)
            return [names(step) for step in islice(steps, stop - start)]

        got = side_by_side(world_size, consume)
        assert got == planned(plan, world_size, start, stop)
        for shares in zip(*got, strict=True):
            seen += [pair for _, batches in shares for batch in batches for pair in batch]
    # Over the ranks, step by step, all pairs of the plan and each once.
    ids = pair_ids(index)
    assert len(seen) == plan.num_steps * BATCH
    for step, rows in plan.steps():
        assert sorted(seen[step * BATCH : (step + 1) * BATCH]) == sorted(ids[row] for row in rows)


@pytest.mark.ray
def test_a_plan_that_is_done_ends_at_once(busy_ray, index: PlanIndex):
    plan = plan_over(index, 20)
    splits = splits_of(plan, 2, plan.num_steps)
    end = plan.num_steps
    assert side_by_side(2, lambda rank: list(received_steps(splits[rank], rank, end, end))) == [[], []]


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [1, 3])
def test_little_is_read_ahead_of_a_slow_worker(busy_ray, tmp_path: Path, world_size: int):
    # A group of steps is a window of 16 shards, and files of a later one are opened only when its turn comes.
    many, _ = indices(tmp_path, shards(40 * 8 * BATCH, num_shards=640))
    plan = plan_over(many, 320)
    assert plan.num_steps == 320 and group_size(plan) == 8

    def remove_all() -> None:
        for uri in many.shards:
            Path(uri).unlink()

    got = in_step(plan, world_size, at=20, do=remove_all)
    for rank, steps in enumerate(planned(plan, world_size, 0, plan.num_steps)):
        received = [step for step in got[rank] if not isinstance(step, str)]
        assert received == steps[: len(received)]
        # The one group that workers are on, and some more, but nothing near the 37 that are left.
        assert 24 < len(received) <= 20 + 10 * 8
    errors = [step for steps in got for step in steps if isinstance(step, str)]
    assert errors and all(".parquet" in error and "cannot be read" in error for error in errors)


@pytest.mark.ray
def test_a_feed_whose_process_is_killed_goes_on_exactly(busy_ray, index: PlanIndex):
    plan = plan_over(index, 200)

    def kill() -> None:
        found = [pid for pid, line in processes_below(os.getpid()).items() if "fetch_stretch" in line]
        assert found, processes_below(os.getpid())
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    assert in_step(plan, 2, at=20, do=kill) == planned(plan, 2, 0, plan.num_steps)


@pytest.mark.ray
def test_a_feed_without_room_to_read_ahead_does_not_come_to_rest(
    busy_ray, index: PlanIndex, monkeypatch: pytest.MonkeyPatch
):
    # As where the pairs of some steps are much longer than the mean that room is planned for; in two tasks.
    monkeypatch.setattr(stream, "_GROUPS_AHEAD", 0)
    plan = plan_over(index, 160)
    assert in_step(plan, 8) == planned(plan, 8, 0, plan.num_steps)
