"""Raw preference shards → canonical pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.artifacts import Artifact, digest, file_hash
from dpo_ray.errors import DataError
from dpo_ray.formats import check_columns, is_unpaired
from dpo_ray.loss_options import LossOptions
from dpo_ray.on_ray.shards import Pool, ShardTask, shard_stage
from dpo_ray.pairs import PAIRS
from dpo_ray.shard_work import IngestShard
from dpo_ray.storage import Location, find_files
from pipelines.context import RunContext


def ingest(context: RunContext) -> Artifact:
    """The pairs of data.train and data.eval. Raises DataError on unreadable files and on too many bad rows."""
    return context.stage("ingest", lambda: _ingest(context))


def input_files(pattern: str, key: str, loss: LossOptions) -> list[tuple[Location, int]]:
    """The Parquet files that a path names, each with its number of rows; every footer is read.

    Raises DataError where there is none, where a file is not Parquet, where it can hold no preferences, or where its
    rows are unpaired and the loss compares two answers.
    """
    found = find_files(pattern, ".parquet")
    if not found:
        raise DataError(
            f"{key} is {pattern}, and no file is there. Check the path; a glob is quoted in the shell, as in "
            f"-o '{key}=data/*.parquet'."
        )
    return [(location, _rows(location, loss)) for location in found]


def _rows(location: Location, loss: LossOptions) -> int:
    fs, path = location.filesystem()
    try:
        with fs.open_input_file(path) as stream:
            parquet = pq.ParquetFile(stream)
            columns, rows = parquet.schema_arrow.names, parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{location} is not a readable Parquet file ({' '.join(str(error).split())}). Write it again, or take it "
            "out of data.train and data.eval; it is not passed over silently."
        ) from error
    check_columns(columns, str(location))
    if is_unpaired(columns) and not loss.accepts_unpaired:
        raise DataError(
            f"{location} holds single answers with a label (prompt, completion, label), and train.loss.type="
            f"{loss.type} compares two answers to a prompt. Set train.loss.type=kto, which learns from single answers, "
            "or give paired data: chosen and rejected."
        )
    return rows


def _ingest(context: RunContext) -> tuple[Artifact, bool]:
    data, seed = context.config.data, context.config.run.seed
    assert data.train is not None
    tasks: list[ShardTask] = []
    sides = [(data.train, "data.train", "train" if data.eval else None)]
    if data.eval:
        sides.append((data.eval, "data.eval", "eval"))
    for pattern, key, split in sides:
        files = input_files(pattern, key, context.config.train.loss)
        if not any(rows for _, rows in files):
            raise DataError(f"{key} is {pattern}: {len(files)} readable files, but not a single row in them.")
        for location, rows in files:
            tasks += _tasks(location, rows, split, data.rows_per_shard)
    identity: dict[str, Any] = {
        "held_out_fraction": data.held_out_fraction if data.eval is None else None,
        "seed": seed,
        "columns": PAIRS.names,
    }
    artifact, reused = shard_stage(
        context.output,
        "pairs",
        identity=identity,
        inputs={"files": digest([t.content for t in tasks])},
        tasks=tasks,
        pool=Pool(IngestShard, {"held_out_fraction": data.held_out_fraction, "seed": seed}, num_actors=2),
    )
    require_enough_kept(artifact, data.max_quarantined_fraction)
    return artifact, reused


def _tasks(location: Location, rows: int, split: str | None, rows_per_shard: int) -> list[ShardTask]:
    content = file_hash(location)
    task = ShardTask(source={"file": location.uri, "split": split}, content=f"{content}:{split}", rows=0)
    tasks = []
    for first in range(0, rows, rows_per_shard):
        count = min(rows_per_shard, rows - first)
        source = {**task.source, "first": first, "count": count}
        tasks.append(replace(task, source=source, content=f"{task.content}:{first}:{count}", rows=count))
    return tasks


def require_enough_kept(pairs: Artifact, max_quarantined_fraction: float) -> None:
    """Raises DataError where too large a share of the rows was quarantined, or where no pair is left."""
    counters = pairs.manifest.counters
    read, kept = counters["read"], counters["kept"]
    bad = {k: v for k, v in counters.items() if k not in {"read", "kept"}}
    quarantined = sum(bad.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(bad.items(), key=lambda item: -item[1]))
    if quarantined > max_quarantined_fraction * read:
        raise DataError(
            f"{quarantined} of {read} rows ({quarantined / read:.1%}) make no preference pair ({reasons}), more than "
            f"data.max_quarantined_fraction={max_quarantined_fraction:g} allows. The rows, with their reasons, are in "
            f"{pairs.location}/quarantine; mend the input, or raise the limit if they may be left out."
        )
    if kept == 0:
        raise DataError(f"None of the {read} rows read makes a preference pair ({reasons}).")
