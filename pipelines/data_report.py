"""Pairs, tokenized pairs and reference scores → the data report."""

from __future__ import annotations

from dpo_ray.data.duplicates import PairsShard
from dpo_ray.data.report import merge, preference_lines, report, report_lines
from dpo_ray.data.tally import Tally
from dpo_ray.on_ray.pool import ShardTask, rows_pool, shard_stage
from dpo_ray.progress import say
from dpo_ray.shards.measure import MeasuredShard, MeasureShard, What
from dpo_ray.shards.measure import identity as measure_identity
from dpo_ray.storage.artifact import Artifact, Contents, make, read_shard
from dpo_ray.storage.location import Location
from pipelines.context import RunContext
from pipelines.deduplicate import kept_tasks

KIND = "data_report"
_REPORT = 2
"""Raised when the report says other things of the same measures."""


def report_data(
    context: RunContext, pairs: Artifact, left_out: Artifact, tokenized: Artifact, scored: Artifact | None = None
) -> Artifact:
    """Measure the data and say it; the artifact's metrics are the report, which is `data` in the summary.

    Args:
        left_out: what pipelines.deduplicate made of the pairs.
        scored: the tokenized rows with reference log-probs, once there are such.
    """
    name = KIND if scored is None else "data_report_reference"
    artifact = context.stage(name, lambda: _report(context, pairs, left_out, tokenized, scored))
    found = artifact.manifest.metrics
    context.results["data"] = found
    for line in report_lines(found) if scored is None else preference_lines(found):
        say("data", line)
    return artifact


def _report(
    context: RunContext, pairs: Artifact, left_out: Artifact, tokenized: Artifact, scored: Artifact | None
) -> tuple[Artifact, bool]:
    made = {"pairs": pairs, "duplicates": left_out, "tokenized": tokenized, "scored": scored}
    inputs = {name: artifact.fingerprint for name, artifact in made.items() if artifact is not None}
    measured_by = measure_identity()

    def measure(_: Location) -> Contents:
        # All in one stage, so that Ray is asked once; what an earlier report measured is taken over.
        tasks = [
            *(_task(task, "pairs") for task in kept_tasks(pairs, left_out)),
            *(_task(task, "tokens") for task in kept_tasks(tokenized, None)),
            *(_task(task, "reference") for task in (kept_tasks(scored, None) if scored is not None else [])),
        ]
        measured, _reused = shard_stage(
            context.output,
            "measures",
            identity=measured_by,
            inputs=inputs,
            tasks=tasks,
            pool=rows_pool(context.config, MeasureShard, {}),
        )
        metrics = report(
            merge(read_shard(shard) for shard in measured.shards()),
            ingested=Tally.of(pairs.manifest.counters) if context.config.generate is None else None,
            left_out=Tally.of(left_out.manifest.counters),
            tokenized=Tally.of(tokenized.manifest.counters),
            formats=context.formats,
        )
        return Contents(metrics=metrics)

    return make(context.output, KIND, {**measured_by, "report": _REPORT}, inputs, measure)


def _task(task: ShardTask[PairsShard], what: What) -> ShardTask[MeasuredShard]:
    return ShardTask(MeasuredShard(what, task.source), f"{what} {task.content}", task.rows)
