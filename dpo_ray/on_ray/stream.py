"""The step plan as a Ray Data stream: each training worker receives its share of each step, in order.

Ray's splitter gives a block to the consumer that has been given the fewest rows, the first of equals. So every block
here is one row: a rank's share of a group of steps, packed as Arrow IPC bytes. Ranks take turns, and block k goes to
rank k mod W whatever the lengths of pairs are.

One task at a time walks along a stretch of the plan and yields its blocks as they are asked for. It waits when two of
its blocks have not been taken over, and Ray takes over none while a few groups lie in the object store, unless a worker
has nothing to go on with. Workers wait for each other in every step, so none has nothing because another is slow. What
is read ahead therefore grows neither with the length of the run nor while a worker pauses. A task is told the first
step of its stretch; the plan itself lies in the object store, once.
"""

from __future__ import annotations

import math
import pickle
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from itertools import groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train

from dpo_ray.config import NodeChoice
from dpo_ray.config.placement import ANYWHERE
from dpo_ray.errors import DataError
from dpo_ray.on_ray.failures import carried
from dpo_ray.on_ray.session import quiet_data
from dpo_ray.pairs import TokenizedPair, tokenized_pair
from dpo_ray.shards.deaths import Deaths
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard
from dpo_ray.training.batch import Share, Step, batch_weight
from dpo_ray.training.index import PlanIndex
from dpo_ray.training.plan import StepPlan
from dpo_ray.training.plan import microbatches as spread_rows

TRAIN = "train"
"""Name of the stream among Ray Train's data sets."""

_STEPS_PER_GROUP = 8  # Ray takes about 10 ms for a block; eight steps hide that, and are little to read ahead
_TOKENS_PER_GROUP = 4 << 20  # of long pairs and large batches a group has fewer steps: at most about 64 MiB
_GROUPS_PER_TASK = 16  # one that dies begins its stretch again
_MOST_TASKS = 1024  # of a long plan they have more groups: Ray is given all tasks before the first begins
_SECONDS_TO_REST = 0.01  # about what Ray takes for a block
_GROUPS_AHEAD = 4  # one that workers train on, one that each has fetched already, and two on their way

_BLOCK = pa.schema([("rank", pa.int32()), ("step", pa.int64()), ("share", pa.large_binary()), ("error", pa.binary())])
_BATCH_WEIGHT = "batch_weight"
_PAIR_COLUMNS = [field.name for field in fields(TokenizedPair)]


def feed_dataset(
    plan: StepPlan,
    start: int,
    world_size: int,
    tokens_per_microbatch: int,
    notes: Location,
    place: NodeChoice = ANYWHERE,
) -> ray.data.Dataset:
    """The stream of shares of the steps from `start` on, one block of one row a rank and group of steps.

    Args:
        notes: folder in which attempts at a stretch are noted while they are under way.
        place: nodes of the tasks, by their labels.
    """
    quiet_data()  # Ray Train calls this in a process of its own
    steps_per_group = group_size(plan)
    groups = math.ceil((plan.num_steps - start) / steps_per_group)
    steps_per_task = steps_per_group * max(_GROUPS_PER_TASK, math.ceil(groups / _MOST_TASKS))
    # A finished run that is asked again has no steps left, but Ray wants a data set all the same.
    stretches = [{"first": first} for first in range(start, plan.num_steps, steps_per_task)] or [{"first": start}]
    # It claims no CPU of its own, nor a custom resource: workers may have taken them all, elastic ones whatever there
    # is, and would then wait for a feed that waits for them. One task at a time is little work beside a training step.
    stream = ray.data.from_items(stretches, override_num_blocks=len(stretches)).map_batches(
        fetch_stretch,
        fn_kwargs={
            "plan": ray.put(plan),
            "notes": notes,
            "run": uuid.uuid4().hex,
            "num_steps": steps_per_task,
            "steps_per_group": steps_per_group,
            "world_size": world_size,
            "tokens_per_microbatch": tokens_per_microbatch,
        },
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,
        # A second task would fill the room for what is read ahead with blocks whose turn comes after the first's.
        compute=ray.data.TaskPoolStrategy(size=1),
        **place.options_of_labels,
    )
    stream.context.target_max_block_size = 1  # byte: Ray would join rows of one task to larger blocks
    stream.context.custom_execution_callback_classes = [Unhurried]
    return stream


class Unhurried:
    """Has Ray Data's loop over its operators rest where a round moved no block, in the process that feeds the workers.

    The loop waits for tasks, but not while one has a block ready that may not be taken over yet: and so it is for most
    of a training, which would keep a core busy that workers may need.
    """

    def __init__(self) -> None:
        self._moved = -1

    def before_execution_starts(self, executor: Any) -> None:
        """As Ray calls it; nothing is done."""

    def on_execution_step(self, executor: Any) -> None:
        """A round has ended."""
        moved = sum(op.metrics.num_inputs_received + op.metrics.num_outputs_taken for op in executor._topology)
        if moved == self._moved:
            time.sleep(_SECONDS_TO_REST)
        self._moved = moved

    def after_execution_succeeds(self, executor: Any) -> None:
        """As Ray calls it; nothing is done."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """As Ray calls it; nothing is done."""


def group_size(plan: StepPlan) -> int:
    """Steps whose shares travel together."""
    tokens_per_step = plan.global_batch_size * plan.index.mean_lengths.sum()
    return int(np.clip(_TOKENS_PER_GROUP // tokens_per_step, 1, _STEPS_PER_GROUP))


def fetch_stretch(
    batch: pa.Table, plan: ray.ObjectRef[StepPlan], num_steps: int, notes: Location, run: str, **options: int
) -> Iterator[pa.Table]:
    """First step of a stretch → its blocks. Raises DpoRayError where processes die of it again and again."""
    first = batch["first"][0].as_py()
    work = f"to read the pairs of the steps {first + 1} to {first + num_steps}"
    with Deaths(notes / f"{first}.json", work, run).attempt():
        yield from share_blocks(ray.get(plan), first, first + num_steps, **options)


def share_blocks(
    plan: StepPlan, start: int, stop: int, *, steps_per_group: int, world_size: int, tokens_per_microbatch: int
) -> Iterator[pa.Table]:
    """The steps from `start` up to `stop` in blocks of one row: groups in order, and in each the ranks in order.

    Where rows cannot be read, each rank's block has that error in place of its share, and is the last.
    """
    steps = islice(plan.steps(start), stop - start)
    read = lru_cache(maxsize=2 * plan.shards_at_once)(_shard)  # a step may lie in two windows
    while group := list(islice(steps, steps_per_group)):
        shares = [(step, plan.microbatches(rows, world_size, tokens_per_microbatch)) for step, rows in group]
        first = group[0][0]
        try:
            pairs = _Rows(plan.index, np.unique(np.concatenate([rows for _, rows in group])), read)
        except DataError as error:
            # Every rank is told, at the same step: raised here, Ray would have all of them start again and again.
            told = carried(error)
            yield from (_block(rank, first, error=told) for rank in range(world_size))
            return
        weights = {step: batch_weight(pairs.column("weight", rows)) for step, rows in group}
        for rank in range(world_size):
            yield _block(rank, first, share=_pack(pairs, [(step, share[rank]) for step, share in shares], weights))


def _block(rank: int, step: int, share: bytes | None = None, error: bytes | None = None) -> pa.Table:
    return pa.Table.from_pydict({"rank": [rank], "step": [step], "share": [share], "error": [error]}, schema=_BLOCK)


def _pack(pairs: _Rows, shares: list[tuple[int, list[list[int]]]], weights: Mapping[int, float]) -> bytes:
    """A rank's micro-batches of some steps, with what is in their rows. weights: step → that of its whole batch."""
    places = [
        (step, len(share), number, row) for step, share in shares for number, rows in enumerate(share) for row in rows
    ]
    steps, counts, numbers, rows = (list(column) for column in zip(*places, strict=True))
    table = pairs.take(rows)
    for name, values in (("step", steps), ("num_microbatches", counts), ("microbatch", numbers)):
        table = table.append_column(name, pa.array(values, pa.int64()))
    table = table.append_column(_BATCH_WEIGHT, pa.array([weights[step] for step in steps], pa.float64()))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


class _Rows:
    """What is in some rows of the index: each shard is read once, and nothing else of it is kept.

    Ranks one after the other would read the shards of a group again and again, where it touches many small ones.
    """

    def __init__(self, index: PlanIndex, rows: np.ndarray, read: Callable[[str], pa.Table]) -> None:
        """`rows`: ascending, none of them twice; `read`: a shard by its URI."""
        shards = index.shard_of(rows)
        order = np.argsort(shards, kind="stable")
        parts = [
            read(index.shards[shard]).take(pa.array(index.row[rows[members]]))
            for shard, members in _by_value(shards, order)
        ]
        self.table = pa.concat_tables(parts).combine_chunks()
        self.rows = rows
        self.place = np.empty(len(rows), dtype=np.int64)
        self.place[order] = np.arange(len(rows))

    def take(self, rows: Sequence[int]) -> pa.Table:
        return self.table.take(pa.array(self.place[np.searchsorted(self.rows, rows)]))

    def column(self, name: str, rows: np.ndarray) -> list[Any]:
        """What rows have in a column; None of each where there is no such column."""
        if name not in self.table.column_names:
            return [None] * len(rows)
        values: list[Any] = self.table[name].take(pa.array(self.place[np.searchsorted(self.rows, rows)])).to_pylist()
        return values


def _by_value(values: np.ndarray, order: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each value, with the part of `order`, which sorts the values, that has it."""
    sizes = np.unique(values, return_counts=True)
    for value, members in zip(sizes[0], np.split(order, np.cumsum(sizes[1])[:-1]), strict=True):
        yield int(value), members


def _shard(uri: str) -> pa.Table:
    table = read_whole_shard(Location(uri))
    return table.select([name for name in _PAIR_COLUMNS if name in table.column_names]).replace_schema_metadata()


class StepFeed(ray.train.DataConfig):
    """Makes the stream for the workers that there are.

    Ray Train asks for it whenever it starts a group of workers, which after a failure may be fewer or more than
    before. The stream then begins at the step that was reached.
    """

    def __init__(
        self,
        plan: StepPlan,
        tokens_per_microbatch: int,
        reached: Callable[[], int],
        notes: Location,
        place: NodeChoice = ANYWHERE,
    ) -> None:
        room = ray.data.ExecutionResources.for_limits(object_store_memory=_GROUPS_AHEAD * _group_bytes(plan))
        super().__init__(
            execution_options=ray.data.ExecutionOptions(preserve_order=True, resource_limits=room),
            enable_shard_locality=False,
        )
        self.plan = plan
        self.tokens_per_microbatch = tokens_per_microbatch
        self.reached = reached
        self.notes = notes
        self.place = place

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> Any:
        reached = self.reached()
        ordered = feed_dataset(self.plan, reached, world_size, self.tokens_per_microbatch, self.notes, self.place)
        ordered.context.execution_options = self._resolve_execution_options(TRAIN)
        ordered.context.enable_progress_bars = False
        # A step may take longer than Ray Data's patience with a slow consumer.
        ordered.context.execution_no_progress_timeout_s = -1
        # equal=True would hold back blocks to even out rows, and drop what is left over.
        return [{TRAIN: split} for split in ordered.streaming_split(world_size, equal=False, locality_hints=None)]


def _group_bytes(plan: StepPlan) -> int:
    """Of a group of steps over all ranks, as they lie in the object store; rather too many."""
    # A token is 4 bytes, the log-prob of one in a completion 4, and a mismatched completion is half as much again.
    pair = plan.index.mean_lengths @ (4, 12, 12) + 256
    return int(group_size(plan) * plan.global_batch_size * pair)


def placeholder() -> ray.data.Dataset:
    """What Ray Train is given by name, so that it asks StepFeed, which alone knows how many workers there are."""
    return ray.data.from_items([{"first": 0}])


def received_steps(shard: Any, rank: int, start: int, stop: int) -> Iterator[Step]:
    """The steps of one rank from its share of the stream, earlier steps than `start` passed over.

    Args:
        stop: the number of steps of the plan.

    Raises DataError where the rows of a step cannot be read; RuntimeError where a block of another rank or an
    unexpected step arrives, or where the stream ends before `stop`: training on would be wrong.
    """
    expected = start
    for number, members in _received(shard, rank):
        if number < start:
            continue
        if number != expected:
            raise _disorder(f"rank {rank} expected step {expected}, but was given step {number}")
        expected += 1
        microbatches: list[list[TokenizedPair]] = [[] for _ in range(members[0]["num_microbatches"])]
        for row in members:
            microbatches[row["microbatch"]].append(tokenized_pair(row))
        pairs = [pair for microbatch in microbatches for pair in microbatch]
        filler = min(pairs, key=lambda pair: pair.num_tokens)
        yield Step(number, Share(microbatches, filler, members[0][_BATCH_WEIGHT]))
    if expected < stop:
        raise _disorder(f"rank {rank} expected step {expected} of {stop}, but the stream ended")


def _received(shard: Any, rank: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Steps in the order of the stream, with the rows of a rank's share."""
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow"):
        for owner, step, share, error in zip(*(block[name] for name in _BLOCK.names), strict=True):
            if owner.as_py() != rank:
                raise _disorder(f"rank {rank} was given the share of rank {owner} of the steps from {step} on")
            if error.is_valid:
                raise pickle.loads(error.as_py())
            rows = pa.ipc.open_stream(share.as_buffer()).read_all().to_pylist()
            for number, members in groupby(rows, key=lambda row: row["step"]):
                yield number, list(members)


def _disorder(what: str) -> RuntimeError:
    return RuntimeError(
        f"The training feed is out of order: {what}. Nothing wrong was trained on, and checkpoints are good: the same "
        "command goes on from the last one. If it happens again at the same step, the installed Ray deals out blocks "
        "otherwise than the feed relies on: install the version of Ray that pyproject.toml names."
    )


def read_share(
    index: PlanIndex, rows: np.ndarray, rank: int, world_size: int, tokens_per_microbatch: int, hidden_size: int
) -> Share:
    """A rank's share of some rows of the index, read at once: for few pairs that are used again and again."""
    mine = spread_rows(index, rows, world_size, tokens_per_microbatch, hidden_size)[rank]

    wanted = np.unique(rows)
    pairs = dict(zip(wanted.tolist(), _Rows(index, wanted, _shard).take(wanted.tolist()).to_pylist(), strict=True))

    def pair(row: int) -> TokenizedPair:
        return tokenized_pair(pairs[row])

    shortest = int(rows[np.argmin(index.lengths[rows].sum(axis=1))])
    weight = batch_weight(pairs[row].get("weight") for row in rows.tolist())
    return Share([[pair(row) for row in group] for group in mine], pair(shortest), weight)
