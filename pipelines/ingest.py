"""Raw preference shards → canonical pairs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

from dpo_ray.config import Columns, Config, Data, Paths
from dpo_ray.config.layouts import Layout, recognise, texts_of
from dpo_ray.data.quarantine import require_enough_kept
from dpo_ray.data.raw.files import SUFFIXES, Stamp
from dpo_ray.data.raw.partitions import in_partitions, in_period
from dpo_ray.data.raw.scan import FileRecord, Peek, map_files, peek, read_record, require_usable
from dpo_ray.errors import DataError
from dpo_ray.on_ray.pool import ShardTask, each_its_own, rows_pool, shard_stage
from dpo_ray.on_ray.scan import scan_files
from dpo_ray.pairs import Split
from dpo_ray.shards.ingest import IngestShard, RawShard, identity
from dpo_ray.storage.artifact import Artifact, digest
from dpo_ray.storage.lineage import FOLDER as LINEAGE
from dpo_ray.storage.lineage import SourceFile
from dpo_ray.storage.location import Location, find_files
from pipelines.context import RunContext
from pipelines.input import tell_input

FILES = "artifacts/files"
"""Below run.output: what was found out about the input files."""


Side = tuple[str, list[Location], Split | None]
"""Key of the configuration, its files, and the side of the split that they are; None: it is cut from them."""


def ingest(context: RunContext) -> Artifact:
    """The pairs of data.train and data.eval. Raises DataError on unreadable files and on too many bad rows."""
    pairs = context.stage("ingest", lambda: _ingest(context, sides(context.config)))
    context.results["input"] = tell_input(context, pairs)
    return pairs


def ingest_set(context: RunContext, key: str, paths: Paths) -> Artifact:
    """Files of preferences as held-out pairs. Raises as `ingest` does. key: of the configuration, for messages."""
    side: Side = (key, input_files(paths, key, context.output), "eval")
    return context.stage("ingest", lambda: _ingest(context, [side]))


def check_inputs(config: Config) -> None:
    """What a first look at the input files can tell before work begins; files that were scanned are not opened.

    Raises DataError where there is no file or no row, where files are unreadable or can hold no preferences, or where
    their rows are unpaired and the loss compares two answers; ConfigError where an option is of no use to them.
    """
    layouts = set()
    for key, files, _ in sides(config):
        found = map_files(lambda file: _known(file, config), files)
        _require_rows([file for file, _ in found], key)
        layouts |= {layout for _, layout in found if layout is not None}
    config.data.require_used(layouts)


def check_set(config: Config, name: str, paths: Paths) -> None:
    """The same of a set of evaluate.sets, whose files are read by their own columns."""
    key = f"evaluate.sets.{name}"
    files = input_files(paths, key, Location.of(config.run.output))
    _require_rows([file for file, _ in map_files(lambda file: _known(file, of_set(config)), files)], key)


def of_set(config: Config) -> Config:
    """The configuration for a set: its files are read by their own columns, whatever the training data's are called."""
    return config.model_copy(update={"data": config.data.model_copy(update={"columns": Columns(), "layout": "auto"})})


def _known(file: Location, config: Config) -> tuple[Peek | FileRecord, Layout | None]:
    folder = Location.of(config.run.output) / FILES
    found = read_record(folder, Stamp.of(file), config.data.rows_per_shard) or peek(file)
    return found, layout_of(found, str(file), config)


def sides(config: Config) -> list[Side]:
    data, output = config.data, Location.of(config.run.output)
    assert data.train is not None
    train = chosen_files(data, input_files(data.train, "data.train", output))
    if not data.eval:
        return [("data.train", train, None)]
    return [("data.train", train, "train"), ("data.eval", input_files(data.eval, "data.eval", output), "eval")]


def chosen_files(data: Data, files: list[Location]) -> list[Location]:
    """Those that data.since, data.until and data.partitions leave. Raises DataError where they leave none."""
    uris = [file.uri for file in files]
    if data.since is not None or data.until is not None:
        uris = in_period(uris, data.since, data.until)
    if data.partitions:
        uris = in_partitions(uris, data.partitions)
    return [Location(uri) for uri in uris]


def input_files(paths: Paths, key: str, output: Location) -> list[Location]:
    """The files that one or several paths name, each once; of `output` only where a path leads into it.

    Raises DataError where a path names none.
    """
    files: dict[Location, None] = {}
    for pattern in [paths] if isinstance(paths, str) else paths:
        found = find_files(pattern, SUFFIXES)
        # A folder may hold the output as well, whose shards would look like preference data in the next run.
        inside = tuple(f"{_real(output)}/{name}/" for name in ("artifacts", "runs", "models", LINEAGE))
        if not _real(Location.of(pattern)).startswith(inside):
            found = [file for file in found if not _real(file).startswith(inside)]
        if not found:
            raise DataError(
                f"{key} is {pattern}, and no file is there. Check the path; of a folder, the files with these suffixes "
                f"are taken: {', '.join(SUFFIXES)}; a glob is quoted in the shell, as in -o '{key}=data/*.parquet'."
            )
        files |= dict.fromkeys(found)
    return list(files)


def _real(place: Location) -> str:
    """One spelling of a place, whatever links and dots lead to it."""
    return os.path.realpath(place.uri) if place.is_local else place.uri


def known_files(output: Location) -> Iterator[tuple[str, str]]:
    """Every file that a run below `output` has read: where it lay then, and the sha256 of its bytes."""
    for place in (output / FILES).children():
        if place.name.endswith(".json"):
            record = json.loads(place.read_bytes())  # of an earlier version, too
            yield record["uri"], record["sha256"]


def layout_of(found: Peek | FileRecord, source: str, config: Config) -> Layout | None:
    """What the rows of a file are, None for an empty file of JSON lines, which has no columns to be wrong."""
    if not found.has_rows and not found.columns:
        return None
    names, loss = config.data.columns.in_files(), config.train.loss
    layout = recognise(found.columns, source, option=config.data.layout, names=names)
    require_usable(found, [names[field] for field in texts_of(layout) if field in names], source)
    if layout == "unpaired" and not loss.accepts_unpaired:
        raise DataError(
            f"{source} holds single answers with a label (prompt, completion, label), and train.loss.type="
            f"{loss.type} compares two answers to a prompt. Set train.loss.type=kto, which learns from single answers, "
            "or give paired data: chosen and rejected."
        )
    return layout


def _require_rows(found: Sequence[Peek | FileRecord], key: str) -> None:
    if not any(file.has_rows for file in found):
        raise DataError(f"{key} names {len(found)} readable files, but not a single row is in them.")


def _ingest(context: RunContext, sides: list[Side]) -> tuple[Artifact, bool]:
    data, seed = context.config.data, context.config.run.seed
    folder = context.output / FILES
    files = [file for _, files, _ in sides for file in files]
    records = scan_files(folder, files, data.rows_per_shard, context.config.placement.data)
    found = map_files(lambda record: (record, layout_of(record, record.uri, context.config)), records)
    data.require_used({layout for _, layout in found if layout is not None})
    tasks: list[ShardTask[RawShard]] = []
    sources: list[SourceFile] = []
    """Of each task."""
    for key, files, split in sides:
        side, found = found[: len(files)], found[len(files) :]
        _require_rows([record for record, _ in side], key)
        for record, layout in side:
            tasks += [] if layout is None else _tasks(record, layout, folder, split, data)
            sources += [SourceFile(uri=record.uri, key=key, sha256=record.sha256)] * (len(tasks) - len(sources))
    tasks = each_its_own(tasks)
    options = {
        "held_out_fraction": data.held_out_fraction,
        "seed": seed,
        "columns": data.columns,
        "pairing": data.pairing,
        "max_characters": data.max_characters,
    }
    artifact, reused = shard_stage(
        context.output,
        "pairs",
        identity=identity(data, seed),
        inputs={"files": digest([t.content for t in tasks])},
        tasks=tasks,
        pool=rows_pool(context.config, IngestShard, options),
    )
    context.sources.update(zip((shard.name for shard in artifact.shards()), sources, strict=True))
    require_enough_kept(artifact, data.max_quarantined_fraction)
    return artifact, reused


def _tasks(
    record: FileRecord, layout: Layout, folder: Location, split: Split | None, data: Data
) -> list[ShardTask[RawShard]]:
    """A task for each part. Its content is the file's, not its name: a file that was moved is the same."""
    # The layout is part of what the rows are, and so is the pairing for those that it makes pairs of; as options of the
    # stage, they would have every other shard computed again.
    how = f"{layout}:{digest(data.pairing.model_dump())}" if layout == "ranked" else layout
    return [
        ShardTask(
            source=RawShard(rows, layout, split),
            content=f"{record.sha256}:{split}:{how}:{part.first}:{part.rows}",
            rows=part.rows,
        )
        for part, rows in record.sources(folder)
    ]
