"""Raw preference shards → canonical pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_ray.artifacts import Artifact, digest
from dpo_ray.config import Config, Paths
from dpo_ray.errors import DataError
from dpo_ray.formats import PAIRED_COLUMNS, UNPAIRED_COLUMNS, check_columns, is_unpaired
from dpo_ray.loss_options import LossOptions
from dpo_ray.on_ray.scanning import scan_files
from dpo_ray.on_ray.shards import Pool, ShardTask, shard_stage
from dpo_ray.raw_files import SUFFIXES, Stamp
from dpo_ray.raw_scan import FileRecord, Look, each, look, read_record, require_usable
from dpo_ray.shard_work import IngestShard
from dpo_ray.storage import Location, find_files
from pipelines.context import RunContext

FILES = "artifacts/files"
"""Below run.output: what was found out about the input files."""


def ingest(context: RunContext) -> Artifact:
    """The pairs of data.train and data.eval. Raises DataError on unreadable files and on too many bad rows."""
    return context.stage("ingest", lambda: _ingest(context))


def check_inputs(config: Config) -> None:
    """What a first look at the input files can tell before work begins; files that were scanned are not opened.

    Raises DataError where there is no file or no row, where files are unreadable or can hold no preferences, or where
    their rows are unpaired and the loss compares two answers.
    """
    for key, files, _ in _sides(config):
        _require_rows(each(lambda file: _known(file, config), files), key)


def _known(file: Location, config: Config) -> Look | FileRecord:
    folder = Location.of(config.run.output) / FILES
    found = read_record(folder, Stamp.of(file), config.data.rows_per_shard) or look(file)
    _require_preferences(found, str(file), config.train.loss)
    return found


def _sides(config: Config) -> list[tuple[str, list[Location], str | None]]:
    """Key of the configuration, its files, and the side of the split that they are; None: it is cut from them."""
    data, output = config.data, Location.of(config.run.output)
    assert data.train is not None
    sides = [("data.train", input_files(data.train, "data.train", output), "train" if data.eval else None)]
    return [*sides, ("data.eval", input_files(data.eval, "data.eval", output), "eval")] if data.eval else sides


def input_files(paths: Paths, key: str, output: Location) -> list[Location]:
    """The files that one or several paths name, each once; of `output` only where a path leads into it.

    Raises DataError where a path names none.
    """
    files: dict[Location, None] = {}
    for pattern in [paths] if isinstance(paths, str) else paths:
        found = find_files(pattern, SUFFIXES)
        # A folder may hold the output as well, whose shards would look like preference data in the next run.
        inside = f"{output}/"
        if not Location.of(pattern).uri.startswith(inside):
            found = [file for file in found if not file.uri.startswith(inside)]
        if not found:
            raise DataError(
                f"{key} is {pattern}, and no file is there. Check the path; of a folder, the files with these suffixes "
                f"are taken: {', '.join(SUFFIXES)}; a glob is quoted in the shell, as in -o '{key}=data/*.parquet'."
            )
        files |= dict.fromkeys(found)
    return list(files)


def _require_preferences(found: Look | FileRecord, source: str, loss: LossOptions) -> None:
    if not found.has_rows and not found.columns:
        return  # an empty file of JSON lines: it has no columns to be wrong
    check_columns(list(found.columns), source)
    require_usable(found, UNPAIRED_COLUMNS[:2] if is_unpaired(found.columns) else PAIRED_COLUMNS, source)
    if is_unpaired(found.columns) and not loss.accepts_unpaired:
        raise DataError(
            f"{source} holds single answers with a label (prompt, completion, label), and train.loss.type="
            f"{loss.type} compares two answers to a prompt. Set train.loss.type=kto, which learns from single answers, "
            "or give paired data: chosen and rejected."
        )


def _require_rows(found: Sequence[Look | FileRecord], key: str) -> None:
    if not any(file.has_rows for file in found):
        raise DataError(f"{key} names {len(found)} readable files, but not a single row is in them.")


def _ingest(context: RunContext) -> tuple[Artifact, bool]:
    data, seed = context.config.data, context.config.run.seed
    sides = _sides(context.config)
    folder = context.output / FILES
    records = scan_files(folder, [file for _, files, _ in sides for file in files], data.rows_per_shard)
    each(lambda record: _require_preferences(record, record.uri, context.config.train.loss), records)
    tasks: list[ShardTask] = []
    for key, files, split in sides:
        side, records = records[: len(files)], records[len(files) :]
        _require_rows(side, key)
        for record in side:
            tasks += _tasks(record, folder, split)
    identity: dict[str, Any] = {
        "held_out_fraction": data.held_out_fraction if data.eval is None else None,
        "seed": seed,
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


def _tasks(record: FileRecord, folder: Location, split: str | None) -> list[ShardTask]:
    """A task for each part. Its content is the file's, not its name: a file that was moved is the same."""
    return [
        ShardTask(
            source={**source, "split": split},
            content=f"{record.sha256}:{split}:{part.first}:{part.rows}",
            rows=part.rows,
        )
        for part, source in record.sources(folder)
    ]


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
