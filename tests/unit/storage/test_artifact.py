"""Manifests, fingerprints and shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.errors import DataError
from dpo_ray.pairs import PAIRS
from dpo_ray.storage.artifact import (
    MANIFEST,
    Artifact,
    Contents,
    Unfinished,
    describe_file,
    digest,
    file_hash,
    fingerprint,
    inspect_shard,
    load,
    make,
    place,
    publish,
    read_manifest,
    read_shard,
    write_shard,
)
from dpo_ray.storage.finished import only_finished
from dpo_ray.storage.location import Location

IDENTITY = {"max_tokens": 8, "seed": 0}
INPUTS = {"files": "abc"}
TABLE = pa.table({"x": [1, 2, 3]})


def finished(folder: Path) -> Artifact:
    location = Location.of(folder) / fingerprint("pairs", IDENTITY, INPUTS)
    entry = write_shard(location / "part-0.parquet", TABLE, {"read": 4, "bad": 1})
    return publish(location, "pairs", identity=IDENTITY, inputs=INPUTS, files=[entry], counters={"read": 4, "kept": 3})


def test_the_fingerprint_does_not_depend_on_the_order_of_keys():
    swapped = {"seed": 0, "max_tokens": 8}
    assert list(swapped) != list(IDENTITY)
    assert fingerprint("pairs", swapped, INPUTS) == fingerprint("pairs", IDENTITY, INPUTS)


@pytest.mark.parametrize(
    ("kind", "identity", "inputs"),
    [
        ("tokenized", IDENTITY, INPUTS),
        ("pairs", {**IDENTITY, "seed": 1}, INPUTS),
        ("pairs", {**IDENTITY, "more": None}, INPUTS),
        ("pairs", IDENTITY, {"files": "abd"}),
        ("pairs", IDENTITY, {"shards": "abc"}),
    ],
)
def test_the_fingerprint_changes_with_kind_identity_and_inputs(kind: str, identity: dict, inputs: dict):
    assert fingerprint(kind, identity, inputs) != fingerprint("pairs", IDENTITY, INPUTS)


def test_a_digest_tells_numbers_from_their_text():
    assert digest({"a": 1}) != digest({"a": "1"})


def test_a_folder_without_manifest_is_unfinished(tmp_path: Path):
    location = Location.of(tmp_path) / "x"
    assert load(location, "pairs", "x") is None
    write_shard(location / "part-0.parquet", TABLE, {})
    assert load(location, "pairs", "x") is None


def test_a_published_artifact_loads_as_it_was(tmp_path: Path):
    artifact = finished(tmp_path)
    again = load(artifact.location, "pairs", artifact.fingerprint)
    assert again == artifact
    assert again is not None
    assert again.manifest.rows == 3
    assert again.manifest.inputs == INPUTS
    assert read_shard(again.shards()[0]).equals(TABLE)


def test_what_is_made_is_published_once_and_then_taken_over(tmp_path: Path):
    output, asked = Location.of(tmp_path), []

    def compute(location: Location) -> Contents:
        asked.append(location)
        return Contents([write_shard(location / "part-0.parquet", TABLE, {})], {"kept": 3}, {"mean": 2.0})

    artifact, reused = make(output, "pairs", IDENTITY, INPUTS, compute)
    assert not reused
    assert (
        artifact.location
        == place(output, "pairs", IDENTITY, INPUTS)
        == output / "artifacts" / "pairs" / (fingerprint("pairs", IDENTITY, INPUTS))
    )
    manifest = artifact.manifest
    assert (manifest.rows, manifest.counters, manifest.metrics) == (3, {"kept": 3}, {"mean": 2.0})
    assert (manifest.kind, manifest.identity, manifest.inputs) == ("pairs", IDENTITY, INPUTS)
    assert make(output, "pairs", IDENTITY, INPUTS, compute) == (artifact, True)
    assert asked == [artifact.location]
    assert make(output, "pairs", {**IDENTITY, "seed": 1}, INPUTS, compute)[1] is False


def test_nothing_is_published_of_a_computation_that_fails_and_the_next_one_finds_what_it_left(tmp_path: Path):
    output = Location.of(tmp_path)

    def fail(location: Location) -> Contents:
        write_shard(location / "part-0.parquet", TABLE, {})
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        make(output, "pairs", IDENTITY, INPUTS, fail)
    artifact, reused = make(
        output,
        "pairs",
        IDENTITY,
        INPUTS,
        lambda location: Contents(files=[inspect_shard(location / "part-0.parquet")]),
    )
    assert (artifact.manifest.rows, reused) == (3, False)


def test_an_artifact_of_no_shards_has_no_row_count(tmp_path: Path):
    artifact = publish(Location.of(tmp_path), "calibration", identity={}, inputs={}, files=[], metrics={"max": 0.5})
    assert artifact.manifest.rows is None
    assert artifact.shards() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"kind": "pairs"}'])
def test_a_corrupt_manifest_is_an_error_and_not_an_unfinished_folder(tmp_path: Path, content: bytes):
    artifact = finished(tmp_path)
    (artifact.location / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match="not a valid manifest"):
        load(artifact.location, "pairs", artifact.fingerprint)


def test_a_manifest_with_an_unknown_key_is_an_error(tmp_path: Path):
    artifact = finished(tmp_path)
    manifest = json.loads((artifact.location / MANIFEST).read_bytes())
    (artifact.location / MANIFEST).write_bytes(json.dumps({**manifest, "extra": 1}).encode())
    with pytest.raises(DataError, match="not a valid manifest"):
        load(artifact.location, "pairs", artifact.fingerprint)


@pytest.mark.parametrize(("kind", "expected"), [("pairs", "other"), ("tokenized", None)])
def test_a_folder_that_holds_another_artifact_is_an_error(tmp_path: Path, kind: str, expected: str | None):
    artifact = finished(tmp_path)
    with pytest.raises(DataError, match="holds pairs"):
        load(artifact.location, kind, expected or artifact.fingerprint)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path):
    artifact = finished(tmp_path)
    Path((artifact.location / "part-0.parquet").uri).unlink()
    with pytest.raises(DataError, match=r"lacks 1 of its 1 files, the first being part-0\.parquet"):
        load(artifact.location, "pairs", artifact.fingerprint)


@pytest.mark.parametrize("cut_off", [False, True])
def test_what_is_lost_is_an_error_unless_it_is_made_again(tmp_path: Path, cut_off: bool):
    output = Location.of(tmp_path)

    def compute(location: Location) -> Contents:
        return Contents([write_shard(location / "part-0.parquet", TABLE, {})])

    artifact, _ = make(output, "pairs", IDENTITY, INPUTS, compute)
    shard = artifact.shards()[0]
    if cut_off:
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.remove()
    with pytest.raises(DataError, match="lacks 1 of its 1 files"):
        make(output, "pairs", IDENTITY, INPUTS, compute)
    again, reused = make(output, "pairs", IDENTITY, INPUTS, compute, makes_lost=True)
    assert not reused and again.manifest.files == artifact.manifest.files
    assert make(output, "pairs", IDENTITY, INPUTS, compute) == (again, True)


NAMES = [
    "/etc/passwd",
    "../other/manifest.json",
    "shards/../../x.parquet",
    "a//b",
    "",
    ".",
    "a/.",
    "a/ /b",
    "..\\x",
    "C:\\x",
    "a\0b",
    "shards/",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_that_names_a_file_elsewhere_is_refused_by_that_name(tmp_path: Path, name: str):
    artifact = finished(tmp_path)
    manifest = json.loads((artifact.location / MANIFEST).read_bytes())
    manifest["files"][0]["name"] = name
    (artifact.location / MANIFEST).write_bytes(json.dumps(manifest).encode())
    for read in (
        lambda: load(artifact.location, "pairs", artifact.fingerprint),
        lambda: read_manifest(artifact.location),
    ):
        with pytest.raises(DataError, match="not a valid manifest") as caught:
            read()
        assert f"{name!r} is no name of a file below its folder" in str(caught.value)


def test_an_artifact_of_another_schema_is_refused_by_name_with_the_way_out(tmp_path: Path):
    artifact = finished(tmp_path)
    manifest = json.loads((artifact.location / MANIFEST).read_bytes())
    manifest |= {"schema_version": 1, "versions": {"dpo-ray": "0.0.9"}, "a key of then": 1}
    (artifact.location / MANIFEST).write_bytes(json.dumps(manifest).encode())
    with pytest.raises(
        DataError, match=r"is an artifact of schema 1, made by dpo-ray 0\.0\.9.*is made again"
    ) as caught:
        load(artifact.location, "pairs", artifact.fingerprint)
    assert str(artifact.location) in str(caught.value)


def test_a_manifest_says_nothing_of_what_a_file_has_not(tmp_path: Path):
    location = Location.of(tmp_path)
    shard = write_shard(location / "0.parquet", TABLE, {"read": 3})
    files = [shard, write_shard(location / "1.parquet", TABLE, {}), describe_file(location / "0.parquet")]
    artifact = publish(location, "pairs", identity={}, inputs={}, files=files)
    told = json.loads((location / MANIFEST).read_bytes())["files"]
    assert [set(entry) - {"name", "bytes", "sha256"} for entry in told] == [{"rows", "counters"}, {"rows"}, set()]
    assert read_manifest(location).files == artifact.manifest.files == files


def test_files_of_the_pool_lie_beside_the_artifacts_and_are_missed_there(tmp_path: Path):
    kind = Location.of(tmp_path) / "pairs"
    entries = [
        write_shard(kind / name, TABLE, {}).model_copy(update={"name": name, **more})
        for name, more in (("shards/a.parquet", {}), ("shards/quarantine/a.parquet", {"rows": None}))
    ]
    artifact = publish(kind / "f", "pairs", identity={}, inputs={}, files=entries)
    assert artifact.shards() == [kind / "shards" / "a.parquet"]
    assert artifact.quarantines() == [kind / "shards" / "quarantine" / "a.parquet"]
    assert str(artifact.quarantines()[0]) in artifact.where_quarantined()
    assert load(kind / "f", "pairs", artifact.fingerprint) == artifact
    artifact.quarantines()[0].remove()
    with pytest.raises(DataError, match=r"lacks 1 of its 2 files, the first being shards/quarantine/a\.parquet"):
        load(kind / "f", "pairs", artifact.fingerprint)


def test_a_shard_carries_its_counters(tmp_path: Path):
    location = Location.of(tmp_path) / "part-0.parquet"
    entry = write_shard(location, TABLE, {"read": 4, "role_order": 1})
    assert inspect_shard(location) == entry and entry.counters == {"read": 4, "role_order": 1}
    content = location.read_bytes()
    assert (entry.rows, entry.bytes, entry.sha256) == (3, len(content), hashlib.sha256(content).hexdigest())


def test_the_same_rows_and_counters_make_the_same_bytes(tmp_path: Path):
    one = write_shard(Location.of(tmp_path) / "one", TABLE, {"a": 1, "b": 2})
    two = write_shard(Location.of(tmp_path) / "two", TABLE, {"b": 2, "a": 1})
    assert one.sha256 == two.sha256


def test_a_shard_without_rows_keeps_its_schema(tmp_path: Path):
    location = Location.of(tmp_path) / "empty.parquet"
    assert write_shard(location, PAIRS.empty_table(), {"read": 2}).rows == 0
    assert read_shard(location).schema.equals(PAIRS)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no parquet at all"])
def test_a_damaged_shard_is_an_error_that_names_the_file(tmp_path: Path, damage):
    location = Location.of(tmp_path) / "part-0.parquet"
    write_shard(location, TABLE, {})
    location.write_bytes(damage(location.read_bytes()))
    for read in (read_shard, inspect_shard):
        with pytest.raises(DataError, match=r"part-0\.parquet"):
            read(location)


def test_a_missing_shard_is_an_error_that_names_the_file(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.parquet"):
        read_shard(Location.of(tmp_path) / "gone.parquet")


def test_the_hash_of_a_file_is_sha256_of_its_bytes(tmp_path: Path):
    location = Location.of(tmp_path) / "big"
    content = bytes(range(256)) * (5 << 12)  # 5 MiB: more than one read
    location.write_bytes(content)
    assert file_hash(location) == hashlib.sha256(content).hexdigest()
    entry = describe_file(location)
    assert (entry.name, entry.rows, entry.bytes) == ("big", None, len(content))


def test_who_only_asks_gets_what_is_finished_and_has_nothing_computed_or_written(tmp_path: Path):
    output = Location.of(tmp_path)

    def compute(location: Location) -> Contents:
        return Contents(files=[write_shard(location / "part-0.parquet", TABLE, {})])

    with only_finished(claims=False), pytest.raises(Unfinished) as asked:
        make(output, "pairs", IDENTITY, INPUTS, compute, tasks=["a", "b"])
    assert (asked.value.kind, asked.value.tasks) == ("pairs", ("a", "b"))
    assert list(tmp_path.iterdir()) == []
    made, _ = make(output, "pairs", IDENTITY, INPUTS, compute)
    before = sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*"))
    with only_finished(claims=False):
        assert make(output, "pairs", IDENTITY, INPUTS, compute) == (made, True)
    assert sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*")) == before
    made.shards()[0].remove()
    with only_finished(claims=False), pytest.raises(Unfinished):
        make(output, "pairs", IDENTITY, INPUTS, compute, makes_lost=True)
