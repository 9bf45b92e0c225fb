"""Raw preference shards → canonical pairs."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.artifacts import Artifact, digest, file_hash
from dpo_ray.config import Data
from dpo_ray.errors import DataError
from dpo_ray.layouts import Layout, recognise
from dpo_ray.loss_options import LossOptions
from dpo_ray.on_ray.shards import Pool, ShardTask, shard_stage
from dpo_ray.quarantine import require_enough_kept
from dpo_ray.shard_work import IngestShard
from dpo_ray.storage import Location, find_files
from pipelines.context import RunContext


def ingest(context: RunContext) -> Artifact:
    """The pairs of data.train and data.eval. Raises DataError on unreadable files and on too many bad rows."""
    return context.stage("ingest", lambda: _ingest(context))


def input_files(pattern: str, key: str, data: Data, loss: LossOptions) -> list[tuple[Location, int, Layout]]:
    """The Parquet files that a path names, each with its number of rows and its layout; every footer is read.

    Raises DataError where there is none, where a file is not Parquet, where it can hold no preferences, or where its
    rows are unpaired and the loss compares two answers.
    """
    found = find_files(pattern, ".parquet")
    if not found:
        raise DataError(
            f"{key} is {pattern}, and no file is there. Check the path; a glob is quoted in the shell, as in "
            f"-o '{key}=data/*.parquet'."
        )
    return [(location, *_describe(location, data, loss)) for location in found]


def _describe(location: Location, data: Data, loss: LossOptions) -> tuple[int, Layout]:
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
    layout = recognise(columns, str(location), option=data.layout, names=data.columns.in_files())
    if layout == "unpaired" and not loss.accepts_unpaired:
        raise DataError(
            f"{location} holds single answers with a label (prompt, completion, label), and train.loss.type="
            f"{loss.type} compares two answers to a prompt. Set train.loss.type=kto, which learns from single answers, "
            "or give paired data: chosen and rejected."
        )
    return rows, layout


def _ingest(context: RunContext) -> tuple[Artifact, bool]:
    data, seed = context.config.data, context.config.run.seed
    assert data.train is not None
    tasks: list[ShardTask] = []
    layouts: set[Layout] = set()
    sides = [(data.train, "data.train", "train" if data.eval else None)]
    if data.eval:
        sides.append((data.eval, "data.eval", "eval"))
    for pattern, key, split in sides:
        files = input_files(pattern, key, data, context.config.train.loss)
        if not any(rows for _, rows, _ in files):
            raise DataError(f"{key} is {pattern}: {len(files)} readable files, but not a single row in them.")
        for location, rows, layout in files:
            layouts.add(layout)
            tasks += _tasks(location, rows, layout, split, data)
    data.require_used(layouts)
    identity: dict[str, Any] = {
        "held_out_fraction": data.held_out_fraction if data.eval is None else None,
        "seed": seed,
        "renamed": data.columns.renamed(),
        "max_characters": data.max_characters,
    }
    arguments = {
        "held_out_fraction": data.held_out_fraction,
        "seed": seed,
        "columns": data.columns,
        "pairing": data.pairing,
        "max_characters": data.max_characters,
    }
    artifact, reused = shard_stage(
        context.output,
        "pairs",
        identity=identity,
        inputs={"files": digest([t.content for t in tasks])},
        tasks=tasks,
        pool=Pool(IngestShard, arguments, num_actors=2),
    )
    require_enough_kept(artifact, data.max_quarantined_fraction)
    return artifact, reused


def _tasks(location: Location, rows: int, layout: Layout, split: str | None, data: Data) -> list[ShardTask]:
    # The layout is part of what the rows are, and so is the pairing for those that it makes pairs of; as options of the
    # stage, they would have every other shard computed again.
    how = f"{layout}:{digest(data.pairing.model_dump())}" if layout == "ranked" else layout
    content = f"{file_hash(location)}:{split}:{how}"
    tasks = []
    for first in range(0, rows, data.rows_per_shard):
        count = min(data.rows_per_shard, rows - first)
        source = {"file": location.uri, "layout": layout, "split": split, "first": first, "count": count}
        tasks.append(ShardTask(source=source, content=f"{content}:{first}:{count}", rows=count))
    return tasks
