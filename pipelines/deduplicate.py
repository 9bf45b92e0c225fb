"""Canonical pairs → which of their rows are left out: duplicates, contradictions, prompts on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dpo_ray.data.duplicates import REASONS, ROWS_PER_BUCKET, PairsShard, by_shard, num_buckets
from dpo_ray.data.tally import Tally
from dpo_ray.errors import DataError
from dpo_ray.on_ray.pool import ShardTask, each_its_own, rows_pool, shard_stage, shard_tasks
from dpo_ray.progress import say
from dpo_ray.shards.deduplicate import Bucket, DuplicatesShard, Group, RowIdsShard, identity, ids_identity
from dpo_ray.shards.output import Shard
from dpo_ray.storage.artifact import Artifact, digest, read_shard
from pipelines.context import RunContext

_SHARDS_PER_GROUP = 256


def deduplicate(context: RunContext, pairs: Artifact) -> Artifact:
    """The rows of the pairs that later stages leave out, found over all shards. Raises DataError where none is left."""
    left_out = context.stage("duplicates", lambda: _find(context, pairs))
    tally = Tally.of(left_out.manifest.counters)
    if shared := tally.dropped.get("prompt_in_eval"):
        say("duplicates", f"training rows left out because their prompts are in data.eval too: {shared}")
    if not tally.kept:
        reasons = ", ".join(f"{reason} {count}" for reason, count in tally.dropped_for(REASONS).items())
        raise DataError(
            f"Of {tally.read} pairs none is left to train or to evaluate on ({reasons}). A contradiction is two "
            "answers that are judged both ways round: look whether chosen and rejected were swapped in some of the "
            f"files. The rows are named in {left_out.location}."
        )
    return left_out


def kept_tasks(pairs: Artifact, left_out: Artifact | None) -> list[ShardTask[PairsShard]]:
    """One task for each shard of pairs, canonical or tokenized, with the rows to leave out; None: no row.

    These are part of what a task is made of, so that new shards change only those old ones that lose further rows.
    """
    tasks = [ShardTask(PairsShard(task.source.file), task.content, task.rows) for task in shard_tasks(pairs)]
    if left_out is None:
        return tasks
    rows = by_shard(read_shard(shard) for shard in left_out.shards())
    shards = [shard.name for shard in pairs.shards()]
    return each_its_own(
        [
            replace(
                task,
                source=PairsShard(task.source.file, rows[shard]),
                content=f"{task.content} without {rows[shard].content()}",
            )
            if shard in rows
            else task
            for shard, task in zip(shards, tasks, strict=True)
        ]
    )


def groups_of(tasks: list[ShardTask[Shard]]) -> Iterator[list[ShardTask[Shard]]]:
    """The shards in groups of neighbours, as long as a bucket and a number of files allow.

    Where a group ends depends on what is in a shard, and not on how many came before: shards that are added, even in
    the middle, change the groups beside them only.
    """
    group: list[ShardTask[Shard]] = []
    for task in tasks:
        if group and sum(one.rows for one in group) + task.rows > ROWS_PER_BUCKET:
            yield group
            group = []
        group.append(task)
        last = int(digest(task.content), 16) % (_SHARDS_PER_GROUP // 2) == 0
        if last or len(group) == _SHARDS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group


def _find(context: RunContext, pairs: Artifact) -> tuple[Artifact, bool]:
    # Rows are named by the files that they lie in: an artifact that has lost one, and got another, is searched again.
    inputs = {"pairs": pairs.fingerprint, "shards": digest([shard.name for shard in pairs.shards()])}
    ids, _ = shard_stage(
        context.output,
        "row_ids",
        identity=ids_identity(),
        inputs=inputs,
        tasks=[
            ShardTask(
                source=Group(tuple(task.source.file for task in group)),
                content=digest([(task.source.file.rpartition("/")[2], task.content) for task in group]),
                rows=sum(task.rows for task in group),
            )
            for group in groups_of(shard_tasks(pairs))
        ],
        pool=rows_pool(context.config, RowIdsShard, {}),
    )
    rows = pairs.manifest.rows or 0
    buckets = num_buckets(rows)
    groups = tuple(shard.uri for shard in ids.shards())
    return shard_stage(
        context.output,
        "duplicates",
        identity=identity(),
        inputs=inputs,
        tasks=[
            ShardTask(
                source=Bucket(groups, bucket, buckets),
                content=f"{digest(inputs)}: bucket {bucket} of {buckets}",
                rows=rows // buckets,
            )
            for bucket in range(buckets)
        ],
        pool=rows_pool(context.config, DuplicatesShard, {}),
    )
