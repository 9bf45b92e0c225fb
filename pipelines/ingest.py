"""Raw preference shards → canonical pairs."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_ray.config import Columns, Config, Data, Paths
from dpo_ray.data.quarantine import require_enough_kept
from dpo_ray.data.raw.files import SUFFIXES, Stamp, is_data
from dpo_ray.data.raw.partitions import in_partitions, in_period
from dpo_ray.data.raw.parts import Part, RawPart
from dpo_ray.data.raw.scan import FileRecord, Peek, map_files, peek, read_record, require_usable
from dpo_ray.errors import DataError
from dpo_ray.formats.format import Format
from dpo_ray.formats.joined import LARGEST
from dpo_ray.formats.layout import texts_of
from dpo_ray.formats.registry import AUTO, recognise
from dpo_ray.on_ray.pool import Pool, ShardTask, each_its_own, shard_stage
from dpo_ray.on_ray.scan import scan_files
from dpo_ray.pairs import Split
from dpo_ray.progress import say
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
    names = set()
    for key, files, _ in sides(config):
        found = map_files(lambda file: _known(file, config), files)
        _require_rows([file for file, _ in found], key)
        names |= {format_.name for _, format_ in found if format_ is not None}
    config.data.require_used(names)


def check_set(config: Config, name: str, paths: Paths) -> None:
    """The same of a set of evaluate.sets, whose files are read by their own columns."""
    key = f"evaluate.sets.{name}"
    files = input_files(paths, key, Location.of(config.run.output))
    _require_rows([file for file, _ in map_files(lambda file: _known(file, of_set(config)), files)], key)


def of_set(config: Config) -> Config:
    """The configuration for a set: its files are read by their own columns, whatever the training data's are called."""
    return config.model_copy(update={"data": config.data.model_copy(update={"columns": Columns(), "layout": AUTO})})


def _known(file: Location, config: Config) -> tuple[Peek | FileRecord, Format | None]:
    folder = Location.of(config.run.output) / FILES
    found = read_record(folder, Stamp.of(file), config.data.rows_per_shard) or peek(file)
    return found, _learnable(found, str(file), config)


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
        # A folder may hold the output as well, whose shards would look like preference data in the next run.
        inside = tuple(f"{_real(output)}/{name}/" for name in ("artifacts", "runs", "models", LINEAGE))
        is_meant = _real(Location.of(pattern)).startswith(inside)
        of_suffixes = (
            [f for f in find_files(pattern, s) if is_data(f.name) and (is_meant or not _real(f).startswith(inside))]
            for s in SUFFIXES
        )
        found = next(filter(None, of_suffixes), [])
        if not found:
            raise DataError(
                f"{key} is {pattern}, and no file is there. Check the path; of a folder, the files with these suffixes "
                f"are taken: {'; or else '.join(map(', '.join, SUFFIXES))}. A glob is quoted in the shell, as in "
                f"-o '{key}=data/*.parquet'."
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


def written_as(found: Peek | FileRecord, source: str, data: Data) -> Format | None:
    """The format of a file, None for an empty file of text, which has no columns to be wrong. Raises DataError."""
    if not found.has_rows and not found.columns:
        return None
    names = data.columns.renamed()
    format_ = recognise(found.columns, found.sample, source, option=data.layout, names=names)
    if format_.is_layout:
        require_usable(found, [names.get(field, field) for field in texts_of(format_.layout)], source)
    return format_


def _learnable(found: Peek | FileRecord, source: str, config: Config) -> Format | None:
    """The same. Raises DataError also where the loss does not learn from such rows."""
    format_, loss = written_as(found, source, config.data), config.train.loss
    if format_ is not None and format_.layout == "unpaired" and not loss.accepts_unpaired:
        raise DataError(
            f"{source} holds single answers with a label ({format_.about}), and train.loss.type="
            f"{loss.type} compares two answers to a prompt. Set train.loss.type=kto, which learns from single answers, "
            "or give paired data: chosen and rejected."
        )
    return format_


def _require_rows(found: Sequence[Peek | FileRecord], key: str) -> None:
    if not any(file.has_rows for file in found):
        raise DataError(f"{key} names {len(found)} readable files, but not a single row is in them.")


def _ingest(context: RunContext, sides: list[Side]) -> tuple[Artifact, bool]:
    data, seed = context.config.data, context.config.run.seed
    folder = context.output / FILES
    records = scan_files(folder, [file for _, files, _ in sides for file in files], data.rows_per_shard)
    found = map_files(lambda record: (record, _learnable(record, record.uri, context.config)), records)
    data.require_used({format_.name for _, format_ in found if format_ is not None})
    _tell_formats(context, [format_ for _, format_ in found if format_ is not None])
    tasks: list[ShardTask[RawShard]] = []
    sources: list[SourceFile] = []
    """Of each task."""
    for key, files, split in sides:
        side, found = found[: len(files)], found[len(files) :]
        _require_rows([record for record, _ in side], key)
        for record, format_ in side:
            tasks += [] if format_ is None else _tasks(record, format_, folder, split, data)
            sources += [SourceFile(uri=record.uri, key=key, sha256=record.sha256)] * (len(tasks) - len(sources))
    tasks = each_its_own(tasks)
    artifact, reused = shard_stage(
        context.output,
        "pairs",
        identity=identity(data, seed),
        inputs={"files": digest([t.content for t in tasks])},
        tasks=tasks,
        pool=Pool(IngestShard, _options(context.config), stateless=True),
    )
    context.sources.update(zip((shard.name for shard in artifact.shards()), sources, strict=True))
    require_enough_kept(artifact, data.max_quarantined_fraction)
    return artifact, reused


def ingest_shard(config: Config) -> IngestShard:
    """What makes pairs of a part of a file, as the stage does it."""
    return IngestShard(**_options(config))


def _options(config: Config) -> dict[str, Any]:
    data = config.data
    return {
        "held_out_fraction": data.held_out_fraction,
        "seed": config.run.seed,
        "columns": data.columns,
        "pairing": data.pairing,
        "max_characters": data.max_characters,
    }


def _tell_formats(context: RunContext, of_files: Sequence[Format]) -> None:
    context.formats = dict(sorted(Counter(format_.name for format_ in of_files).items()))
    listed = ", ".join(f"{name} in {count} files" for name, count in context.formats.items())
    say("ingest", f"rows are written as {listed}")


def _tasks(
    record: FileRecord, format_: Format, folder: Location, split: Split | None, data: Data
) -> list[ShardTask[RawShard]]:
    """A task for each part. Its content is the file's, not its name: a file that was moved is the same."""
    # The format is part of what the rows are, and so is the pairing for those that it makes pairs of; as options of the
    # stage, they would have every other shard computed again.
    makes_pairs = format_.layout == "ranked"
    how = f"{format_.name}:{digest(data.pairing.model_dump())}" if makes_pairs else format_.name
    parts = list(record.sources(folder))
    return [
        ShardTask(
            source=RawShard(rows, format_.name, split, *(_around(parts, number) if format_.joins else ())),
            content=f"{record.sha256}:{split}:{how}:{part.first}:{part.rows}",
            rows=part.rows,
        )
        for number, (part, rows) in enumerate(parts)
    ]


def _around(parts: Sequence[tuple[Part, RawPart]], number: int) -> tuple[RawPart | None, tuple[RawPart, ...]]:
    """The part before, and the parts after with as many rows as are joined at most."""
    after, rows = [], 0
    for part, source in parts[number + 1 :]:
        if rows >= LARGEST:
            break
        after.append(source)
        rows += part.rows
    return parts[number - 1][1] if number else None, tuple(after)
