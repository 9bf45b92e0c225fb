"""Raw preference shards → canonical pairs."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast, get_args

from dpo_ray.config import Columns, Config, Data, DataSource, Paths
from dpo_ray.config.losses import Judged, require_use
from dpo_ray.data.quarantine import require_enough_kept
from dpo_ray.data.raw.files import SUFFIXES, Stamp, is_data
from dpo_ray.data.raw.partitions import in_partitions, in_period
from dpo_ray.data.raw.parts import Part, RawPart
from dpo_ray.data.raw.scan import FileRecord, Peek, map_files, peek, read_record, require_usable
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.formats.format import Format
from dpo_ray.formats.joined import LARGEST
from dpo_ray.formats.layout import texts_of
from dpo_ray.formats.registry import AUTO, recognise, renamed
from dpo_ray.on_ray.pool import ShardTask, each_its_own, rows_pool, shard_stage
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

_LISTED = 3
FILES = "artifacts/files"
"""Below run.output: what was found out about the input files."""


class Side(NamedTuple):
    """Files that are read for the same."""

    key: str
    """Of the configuration, for messages."""
    files: list[Location]
    split: Split | None
    """The side of the split that their rows are; None: it is cut from them."""
    source: str | None = None
    """The source of a mixture."""
    max_rows: int | None = None
    """Only the first so many rows of all the files."""


def ingest(context: RunContext) -> Artifact:
    """The pairs of data.train and data.eval. Raises DataError on unreadable files and on too many bad rows."""
    pairs = context.stage("ingest", lambda: _ingest(context, sides(context.config)))
    context.results["input"] = tell_input(context, pairs)
    return pairs


def ingest_set(context: RunContext, key: str, paths: Paths) -> Artifact:
    """Files of preferences as held-out pairs. Raises as `ingest` does. key: of the configuration, for messages."""
    side = Side(key, input_files(paths, key, context.output), "eval")
    return context.stage("ingest", lambda: _ingest(context, [side]))


def check_inputs(config: Config) -> None:
    """What a first look at the input files can tell before work begins; files that were scanned are not opened.

    Raises DataError where there is no file or no row, where files are unreadable or can hold no preferences, or where
    their rows are unpaired and the loss compares two answers, or say of pairs what the loss does not use; ConfigError
    where an option is of no use to them.
    """
    names = set()
    output = Location.of(config.run.output)
    for key, paths in _named(config.data):
        tell_passed_over(paths, key, output)
    for side in sides(config):
        found = map_files(lambda file: _known(file, config), side.files)
        require_rows([file for file, _ in found], side.key)
        names |= {format_.name for _, format_ in found if format_ is not None}
        for (one, format_), file in zip(found, side.files, strict=True):
            for column in judged_by(one.columns, format_, config.data) if format_ is not None else ():
                require_use(config.train.loss, column, f"{file} has")
    config.data.require_used(names)


def check_set(config: Config, name: str, paths: Paths) -> None:
    """The same of a set of evaluate.sets, whose files are read by their own columns."""
    key = f"evaluate.sets.{name}"
    files = input_files(paths, key, Location.of(config.run.output))
    require_rows([file for file, _ in map_files(lambda file: _known(file, of_set(config)), files)], key)


def of_set(config: Config) -> Config:
    """The configuration for a set: its files are read by their own columns, whatever the training data's are called.
    Weights and margins are for learning."""
    own = {"columns": Columns(), "layout": AUTO, "ignore": ("weight", "margin"), "ties": "drop"}
    return config.model_copy(update={"data": config.data.model_copy(update=own)})


def _known(file: Location, config: Config) -> tuple[Peek | FileRecord, Format | None]:
    folder = Location.of(config.run.output) / FILES
    found = read_record(folder, Stamp.of(file), config.data.rows_per_shard) or peek(file)
    return found, _learnable(found, str(file), config)


def _named(data: Data) -> Iterator[tuple[str, Paths]]:
    """Key of the configuration → the paths that stand there."""
    for source in data.sources:
        yield f"data.train[{source.name}]", source.path
    if not data.sources:
        yield "data.train", cast("Paths", data.train)
    if data.eval:
        yield "data.eval", data.eval


def sides(config: Config) -> list[Side]:
    data, output = config.data, Location.of(config.run.output)
    assert data.train is not None
    split: Split | None = "train" if data.eval else None

    def trained(paths: Paths, key: str, source: DataSource | None = None) -> Side:
        files = chosen_files(data, input_files(paths, key, output))
        return Side(key, files, split) if source is None else Side(key, files, split, source.name, source.max_rows)

    if data.sources:
        found = [trained(source.path, f"data.train[{source.name}]", source) for source in data.sources]
        _require_apart(found)
    else:
        found = [trained(cast("Paths", data.train), "data.train")]
    if data.eval:
        found.append(Side("data.eval", input_files(data.eval, "data.eval", output), "eval"))
    return found


def _require_apart(sides: Sequence[Side]) -> None:
    """Raises DataError where sources share a file."""
    owner: dict[Location, str] = {}
    for side in sides:
        for file in side.files:
            if (other := owner.setdefault(file, side.key)) != side.key:
                raise DataError(
                    f"{file} is a file of {other} and of {side.key}: whose its rows are cannot be told. Name the files "
                    "of each more closely."
                )


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
        found = next(filter(None, _by_suffix(pattern, output)), [])
        if not found:
            raise DataError(
                f"{key} is {pattern}, and no file is there. Check the path; of a folder, the files with these suffixes "
                f"are taken: {'; or else '.join(map(', '.join, SUFFIXES))}. A glob is quoted in the shell, as in "
                "-o 'data.train=data/*.parquet'."
            )
        files |= dict.fromkeys(found)
    return list(files)


def tell_passed_over(paths: Paths, key: str, output: Location) -> None:
    """Say which files of a folder are not read because others there are."""
    for pattern in [paths] if isinstance(paths, str) else paths:
        taken, *later = [set(files) for files in _by_suffix(pattern, output) if files] or [set()]
        if beside := sorted({file.uri for files in later for file in files - taken}):
            say(
                "ingest",
                f"{key}: of {pattern} {len(taken)} files are read, and {len(beside)} with other suffixes are not, as "
                f"{beside[0]}. Where these are data too, name them beside the folder",
            )


def _by_suffix(pattern: str, output: Location) -> Iterator[list[Location]]:
    """For each of SUFFIXES, files that a path names."""
    # A folder may hold the output as well, whose shards would look like preference data in the next run.
    inside = tuple(f"{_real(output)}/{name}/" for name in ("artifacts", "runs", "models", LINEAGE))
    is_meant = _real(Location.of(pattern)).startswith(inside)
    for s in SUFFIXES:
        yield [f for f in find_files(pattern, s) if is_data(f.name) and (is_meant or not _real(f).startswith(inside))]


def _real(place: Location) -> str:
    """One spelling of a place, whatever links and dots lead to it."""
    return os.path.realpath(place.uri) if place.is_local else place.uri


def known_files(output: Location) -> Iterator[tuple[str, str]]:
    """Every file that a run below `output` has read: where it lay then, and the sha256 of its bytes.

    Raises DataError where the record of one is damaged.
    """
    for place in (output / FILES).children():
        if place.name.endswith(".json"):
            try:
                record = json.loads(place.read_bytes())  # of an earlier version, too
                found = record["uri"], record["sha256"]
            except (ValueError, LookupError, TypeError) as error:
                raise DataError(
                    f"{place}, which says what was read from a file, is damaged. Remove it: the next run that reads "
                    "that file writes it anew."
                ) from error
            yield found


def written_as(found: Peek | FileRecord, source: str, data: Data) -> Format | None:
    """The format of a file, None for an empty file of text, which has no columns to be wrong. Raises DataError."""
    if not found.has_rows and not found.columns:
        return None
    names = data.columns.renamed()
    format_ = recognise(found.columns, found.sample, source, option=data.layout, names=names)
    if format_.is_layout:
        require_usable(found, [names.get(field, field) for field in texts_of(format_.layout)], source)
    if {"margin", "preference"} <= set(judged_by(found.columns, format_, data)):
        raise DataError(
            f"{source} has both a margin and a preference for each pair: two ways to say by how much chosen is better. "
            "Choose the one that is to count, and have the other left aside: data.ignore=[margin] or [preference]."
        )
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


def judged_by(columns: Sequence[str], format_: Format, data: Data) -> list[Judged]:
    """Those of the columns that say how pairs were judged, and are to be read."""
    there = renamed(dict.fromkeys(columns), data.columns.renamed())
    read = [field for field in get_args(Judged) if field in format_.reads and field not in data.ignore]
    return [field for field in read if field in there]


def require_rows(found: Sequence[Peek | FileRecord], key: str) -> None:
    """Raises DataError where none of the files of data.train, of a source of it, or of data.eval has a row."""
    if not any(file.has_rows for file in found):
        raise DataError(
            f"{key} names {len(found)} readable files, but not a single row is in them. Name others, or write these "
            "again."
        )


def _ingest(context: RunContext, sides: list[Side]) -> tuple[Artifact, bool]:
    data, seed = context.config.data, context.config.run.seed
    folder = context.output / FILES
    files = [file for side in sides for file in side.files]
    records = scan_files(folder, files, data.rows_per_shard, context.config.placement.data)
    found = map_files(lambda record: (record, _learnable(record, record.uri, context.config)), records)
    data.require_used({format_.name for _, format_ in found if format_ is not None})
    if empty := [record.uri for record in records if not record.has_rows]:
        more = f" and {len(empty) - _LISTED} more" if len(empty) > _LISTED else ""
        say("ingest", f"{len(empty)} of {len(files)} files hold no row: {', '.join(empty[:_LISTED])}{more}")
    _tell_formats(context, [format_ for _, format_ in found if format_ is not None])
    tasks: list[ShardTask[RawShard]] = []
    sources: list[SourceFile] = []
    """Of each task."""
    for side in sides:
        mine, found = found[: len(side.files)], found[len(side.files) :]
        require_rows([record for record, _ in mine], side.key)
        left = math.inf if side.max_rows is None else side.max_rows
        for record, format_ in mine:
            made = [] if format_ is None else _tasks(record, format_, folder, side, data, left)
            left -= sum(task.rows for task in made)
            tasks += made
            sources += [SourceFile(uri=record.uri, key=side.key, sha256=record.sha256)] * len(made)
    tasks = each_its_own(tasks)
    artifact, reused = shard_stage(
        context.output,
        "pairs",
        identity=identity(data, seed),
        inputs={"files": digest([t.content for t in tasks])},
        tasks=tasks,
        pool=rows_pool(context.config, IngestShard, _options(context.config)),
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
        "ignore": data.ignore,
        "ties": data.ties,
    }


def _tell_formats(context: RunContext, of_files: Sequence[Format]) -> None:
    context.formats = dict(sorted(Counter(format_.name for format_ in of_files).items()))
    listed = ", ".join(f"{name} in {count} files" for name, count in context.formats.items())
    say("ingest", f"rows are written as {listed}")


def require_countable(format_: Format, side: Side) -> None:
    """Raises ConfigError where a source is to give its first so many rows, and its rows are parts of others."""
    if format_.joins and side.max_rows is not None:
        raise ConfigError(
            f"{side.key}: max_rows={side.max_rows} counts rows, and files written as {format_.name} have an answer in "
            "each, which are joined by their prompt: leave max_rows out; its weight sets the source's share."
        )


def _tasks(
    record: FileRecord, format_: Format, folder: Location, side: Side, data: Data, most: float = math.inf
) -> list[ShardTask[RawShard]]:
    """A task for each part. Its content is the file's, not its name: a file that was moved is the same.

    most: rows of the file that are wanted.
    """
    require_countable(format_, side)
    # The format is part of what the rows are, and so is the pairing for those that it makes pairs of; as options of the
    # stage, they would have every other shard computed again.
    makes_pairs = format_.layout == "ranked"
    how = f"{format_.name}:{digest(data.pairing.model_dump())}" if makes_pairs else format_.name
    tasks: list[ShardTask[RawShard]] = []
    parts = list(record.sources(folder))
    for number, (part, rows) in enumerate(parts):
        if most <= 0:
            break
        count = int(min(part.rows, most))
        limit = count if count < part.rows else None
        content = f"{record.sha256}:{side.split}:{how}:{part.first}:{part.rows}"
        content += f":{side.source}" if side.source is not None else ""
        content += f":first {limit}" if limit is not None else ""
        before, after = _around(parts, number) if format_.joins else (None, ())
        source = RawShard(rows, format_.name, side.split, before, after, side.source, limit)
        tasks.append(ShardTask(source, content, count))
        most -= count
    return tasks


def _around(parts: Sequence[tuple[Part, RawPart]], number: int) -> tuple[RawPart | None, tuple[RawPart, ...]]:
    """The part before, and the parts after with as many rows as are joined at most."""
    after, rows = [], 0
    for part, source in parts[number + 1 :]:
        if rows >= LARGEST:
            break
        after.append(source)
        rows += part.rows
    return parts[number - 1][1] if number else None, tuple(after)
