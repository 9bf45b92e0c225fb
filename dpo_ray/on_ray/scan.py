"""Scanning raw files on the cluster, several side by side; what was scanned once is not read again."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from dpo_ray.config import NodeChoice
from dpo_ray.data.raw.files import Stamp
from dpo_ray.data.raw.parts import RowsPerShard
from dpo_ray.data.raw.scan import FileRecord, map_files, one_error, read_record, record_name, scan
from dpo_ray.errors import DataError
from dpo_ray.on_ray.failures import raise_ours
from dpo_ray.on_ray.room import Need
from dpo_ray.on_ray.session import connect
from dpo_ray.progress import Progress, say
from dpo_ray.storage.finished import about_to_compute
from dpo_ray.storage.location import Location

_STAGE = "ingest"


def need(place: NodeChoice) -> Need:
    """Of files that are looked through, on such nodes."""
    return Need("reading data.train and data.eval", beside=1, place=place)


def scan_files(
    folder: Location, files: list[Location], rows_per_shard: RowsPerShard, place: NodeChoice
) -> list[FileRecord]:
    """The records of raw files, in their order: from `folder`, or by scanning what has none there, on such nodes.

    No Ray starts where every file has its record. Raises DataError that names the bad files.
    """
    stamps = map_files(Stamp.of, files)
    records = map_files(lambda stamp: read_record(folder, stamp, rows_per_shard), stamps)
    missing = dict.fromkeys(stamp for stamp, record in zip(stamps, records, strict=True) if record is None)
    if missing:
        about_to_compute("files that were not looked through")
        _scan(folder, list(missing), rows_per_shard, place)
        records = map_files(lambda stamp: read_record(folder, stamp, rows_per_shard), stamps)
    assert all(records)
    return [record for record in records if record is not None]


def _scan(folder: Location, stamps: list[Stamp], rows_per_shard: RowsPerShard, place: NodeChoice) -> None:
    import ray.data

    connect(need(place))
    items = [{"stamp": json.dumps(asdict(stamp))} for stamp in stamps]
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _scan_batch,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"folder": folder, "rows_per_shard": rows_per_shard},
        num_cpus=1,
        max_retries=3,  # Ray Data would scan a file for ever at which the process dies
        **place.options,
    )
    say(_STAGE, f"looking through {len(stamps)} files, {sum(stamp.size for stamp in stamps) / 1e6:.4g} MB")
    progress = Progress(_STAGE, len(stamps), "files")
    bad = []
    try:
        for result in results.iter_rows():
            progress.advance(1)
            bad += [result["error"]] if result["error"] else []
    except Exception as error:
        left = [stamp.uri for stamp in stamps if read_record(folder, stamp, rows_per_shard) is None]
        say(_STAGE, f"{len(left)} files could not be looked through, among them {', '.join(left[:5])}")
        raise_ours(error, _STAGE)
    if bad:
        raise one_error(sorted(bad))


def _scan_batch(batch: pa.Table, folder: Location, rows_per_shard: RowsPerShard) -> pa.Table:
    """Scan files and write their records; a bad file is a row of the answer, so that all of them are told at once."""
    errors = []
    for text in batch["stamp"].to_pylist():
        fields: dict[str, Any] = json.loads(text)
        stamp = Stamp(**fields)
        try:
            record = scan(stamp, rows_per_shard, folder)
        except DataError as error:
            errors.append(str(error))
            continue
        (folder / record_name(stamp, rows_per_shard)).write_bytes(record.model_dump_json().encode())
        errors.append("")
    return pa.table({"error": errors})
