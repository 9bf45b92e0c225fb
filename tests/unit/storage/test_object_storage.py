"""The same promises in an object store, against a real S3 endpoint."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from dpo_ray.errors import ConfigError, DataError, StorageError
from dpo_ray.model.resolve import resolve
from dpo_ray.storage import location as storage
from dpo_ray.storage.artifact import describe_file, file_hash, inspect_shard, load, publish, read_shard, write_shard
from dpo_ray.storage.location import Location, find_files
from tests.object_store import BUCKET, ObjectStore, object_store, upload

LARGE = 11 << 20  # more than one part of an upload


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def place(store: ObjectStore, request: pytest.FixtureRequest) -> Location:
    """A folder of the test's own, which does not exist yet."""
    return Location.of(f"s3://{BUCKET}/{request.node.name.split('[')[0]}")


def test_a_written_file_reads_back_and_leaves_nothing_else(store: ObjectStore, place: Location):
    target = place / "deep" / "file"
    target.write_bytes(b"one")
    target.write_bytes(b"two!")
    assert (target.read_bytes(), target.size(), target.exists()) == (b"two!", 4, True)
    assert store.names(f"{place.name}/") == [f"{place.name}/deep/file"]


def test_a_large_file_reads_back(store: ObjectStore, place: Location):
    content = bytes(range(256)) * (LARGE // 256)
    (place / "large").write_bytes(content)
    assert (place / "large").read_bytes() == content
    assert b"".join((place / "large").read_chunks()) == content


@pytest.mark.parametrize("name", ["a.gz", "a.zst", "a b", "100%", "a#b", "ä", "k=v", "a+b"])
def test_bytes_and_names_are_taken_as_they_are(store: ObjectStore, place: Location, name: str):
    # Not unpacked or packed by its suffix, and not read as a URI's escape or fragment.
    (place / name).write_bytes(b"\x1f\x8b no gzip")
    assert (place / name).read_bytes() == b"\x1f\x8b no gzip"
    assert f"{place.name}/{name}" in store.names(f"{place.name}/")
    assert place / name in place.children()
    assert find_files(f"{place}/*", "") == sorted(place.children(), key=str)


def test_a_killed_writer_leaves_nothing_visible(store: ObjectStore, place: Location):
    """Killed with all of its bytes sent, before the upload is ended."""
    program = f"""
import sys, time
from dpo_ray.storage import location as storage

class Stalling:
    def __init__(self, stream): self.stream = stream
    def __enter__(self): return self
    def __exit__(self, *_): self.stream.close()
    def write(self, data):
        self.stream.write(data)
        self.stream.flush()
        print("sent", flush=True)
        time.sleep(600)

class Filesystem:
    def __init__(self, fs): self.fs = fs
    def open_output_stream(self, *args, **more): return Stalling(self.fs.open_output_stream(*args, **more))

fs, base = storage._filesystem("s3://{BUCKET}")
storage._filesystem = lambda root: (Filesystem(fs), base)
storage.Location.of("{place}/file").write_bytes(b"x" * {LARGE})
"""
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "sent\n"
    uploads = store.client().list_multipart_uploads(Bucket=BUCKET, Prefix=f"{place.name}/")["Uploads"]
    writer.send_signal(signal.SIGKILL)
    writer.wait(60)
    assert [u["Key"] for u in uploads] == [f"{place.name}/file"]
    assert not (place / "file").exists() and place.children() == [] and store.names(f"{place.name}/") == []


def test_an_interrupt_in_a_write_leaves_the_old_content_or_the_new(store: ObjectStore, place: Location, monkeypatch):
    """pyarrow alone would leave an empty file: it makes an object of what an interrupted stream had received."""
    target = place / "file"
    target.write_bytes(b"old")
    upload_now, begun = storage._upload, threading.Event()

    def slow(*arguments) -> None:
        begun.set()
        time.sleep(0.5)
        upload_now(*arguments)

    monkeypatch.setattr(storage, "_upload", slow)
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        begun.wait(60)
        signal.pthread_kill(main, signal.SIGINT)

    # A shell starts what it puts in the background deaf to interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as other:
            other.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                target.write_bytes(b"new")
    finally:
        signal.signal(signal.SIGINT, before)
    assert target.read_bytes() in {b"old", b"new"}


def test_what_pyarrow_does_with_a_stream_that_was_left(store: ObjectStore, place: Location):
    """The reason for the thread and the single call; if pyarrow mends it, they can go (apache/arrow#40502)."""
    fs, path = (place / "half").filesystem()
    with pytest.raises(KeyError), fs.open_output_stream(path) as stream:
        stream.write(b"half")
        raise KeyError
    assert (place / "half").read_bytes() == b"half"


def test_reading_a_missing_file_raises_file_not_found(place: Location):
    with pytest.raises(FileNotFoundError):
        (place / "none").read_bytes()
    with pytest.raises(FileNotFoundError):
        (place / "none").size()
    with pytest.raises(FileNotFoundError):
        list((place / "none").read_chunks())


def test_a_missing_folder_is_empty_and_does_not_exist(place: Location):
    assert place.children() == [] and place.files() == [] and not place.exists()
    place.remove_folder()


def test_a_folder_exists_by_what_is_in_it(place: Location):
    for name in ("b", "a", "c/d"):
        (place / name).write_bytes(b"x")
    assert place.exists() and (place / "c").exists()
    assert not (place / "a/").exists() or (place / "a").size() == 1
    assert [child.name for child in place.children()] == ["a", "b", "c"]
    assert [place.same_store(f.path) for f in place.files()] == [place / "a", place / "b", place / "c" / "d"]
    assert [f.base_name for f in place.files(recursive=False)] == ["a", "b"]


def test_a_prefix_of_a_name_is_no_folder(place: Location):
    (place / "checkpoints-old" / "file").write_bytes(b"")
    assert not (place / "checkpoints").exists() and (place / "checkpoints").children() == []
    (place / "checkpoints").remove_folder()
    assert (place / "checkpoints-old" / "file").exists()


def test_a_removed_folder_is_gone_and_its_neighbour_is_not(place: Location):
    (place / "one" / "deep" / "file").write_bytes(b"")
    (place / "two" / "file").write_bytes(b"")
    (place / "one").remove_folder()
    assert [child.name for child in place.children()] == ["two"]


@pytest.mark.parametrize("size", [0, 5, LARGE])
def test_a_copy_has_the_same_bytes_whichever_way_it_goes(place: Location, tmp_path: Path, size: int):
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    here, there = Location.of(tmp_path / f"a{size}"), place / f"b{size}"
    here.write_bytes(content)
    here.copy_to(there)
    there.copy_to(place / "sub" / "c")
    (place / "sub" / "c").copy_to(Location.of(tmp_path / "back" / "d"))
    assert (tmp_path / "back" / "d").read_bytes() == content == there.read_bytes()


def test_a_file_that_the_store_does_not_copy_itself_goes_through_this_machine(place: Location, monkeypatch):
    monkeypatch.setattr(storage, "_LARGEST_SERVER_COPY", 3)
    (place / "a").write_bytes(b"four")
    (place / "a").copy_to(place / "b")
    assert (place / "b").read_bytes() == b"four"


def test_a_copy_of_a_missing_file_makes_nothing(place: Location, tmp_path: Path):
    for target in (Location.of(tmp_path / "a"), place / "a"):
        with pytest.raises(FileNotFoundError):
            (place / "none").copy_to(target)
        assert not target.exists()
    assert list(tmp_path.iterdir()) == []


def test_files_are_found_by_name_by_folder_and_by_glob(place: Location):
    hidden = ("_SUCCESS.parquet", "_temporary/0/e.parquet")
    for name in ("b.parquet", "a.parquet", "notes.txt", "old/c.parquet", "2026-01-01/x/d.parquet", *hidden):
        (place / name).write_bytes(b"x")

    def found(pattern: str) -> list[str]:
        return [f.uri.removeprefix(f"{place}/") for f in find_files(f"{place}{pattern}", ".parquet")]

    assert found("/notes.txt") == ["notes.txt"]
    assert found("") == found("/") == ["2026-01-01/x/d.parquet", "a.parquet", "b.parquet", "old/c.parquet"]
    assert found("/[ab].parquet") == ["a.parquet", "b.parquet"]
    assert found("/o*/*.parquet") == ["old/c.parquet"]
    assert found("/[0-9]*/**/*.parquet") == ["2026-01-01/x/d.parquet"]
    assert found("/none") == found("/none/*.parquet") == []


def test_a_writable_folder_is_probed_without_a_trace(store: ObjectStore, place: Location):
    place.require_writable()
    assert store.names(f"{place.name}/") == []


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/out", "nosuch://bucket/out"])
def test_an_output_that_cannot_be_written_to_is_a_configuration_error(store: ObjectStore, uri: str):
    with pytest.raises(ConfigError, match="bucket"):
        Location.of(uri).require_writable()


def test_the_filesystem_is_made_once_and_goes_to_workers_without_a_secret(store: ObjectStore, place: Location):
    fs, _ = place.filesystem()
    assert (place / "deep").filesystem()[0] is fs
    assert store.env["AWS_SECRET_ACCESS_KEY"].encode() not in pickle.dumps((fs, place))
    assert pickle.loads(pickle.dumps(fs)).get_file_info(BUCKET).type == pafs.FileType.Directory


@pytest.mark.parametrize("uri", ["s3://key:hidden@bucket/x", "s3://key@bucket/x", "s3://bucket/x?region=eu"])
def test_credentials_and_options_in_a_path_are_refused(uri: str):
    with pytest.raises(ConfigError, match="environment") as caught:
        Location.of(uri)
    assert "hidden" not in str(caught.value) and "key" not in str(caught.value)


def test_a_store_that_is_not_there_says_what_to_check(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")  # it goes before AWS_ENDPOINT_URL
    once = pafs.AwsStandardS3RetryStrategy(max_attempts=1)
    monkeypatch.setattr(storage.pafs, "AwsStandardS3RetryStrategy", lambda max_attempts: once)
    storage._filesystem.cache_clear()
    try:
        for ask in (Location.exists, Location.read_bytes, Location.children, lambda place: place.write_bytes(b"")):
            with pytest.raises(StorageError, match=r"AWS_ENDPOINT_URL_S3=http://127\.0\.0\.1:1") as caught:
                ask(Location.of(f"s3://{BUCKET}/x"))
            assert store.env["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    finally:
        storage._filesystem.cache_clear()


def test_an_artifact_is_published_read_and_missed_as_in_a_folder(place: Location):
    table = pa.table({"x": [1, 2, 3]})
    location = place / "unfinished"
    entry = write_shard(location / "part.parquet", table, {"read": 4})
    quarantine = write_shard(location / "quarantine" / "part.parquet", table, {})
    assert load(location, "pairs", "any") is None
    files = [entry, quarantine.model_copy(update={"name": "quarantine/part.parquet"})]
    artifact = publish(location, "pairs", identity={}, inputs={}, files=files)
    again = load(location, "pairs", artifact.fingerprint)
    assert again == artifact and again is not None
    assert read_shard(again.shards()[0]).equals(table) and read_shard(again.shards()[0], ["x"]).equals(table)
    assert inspect_shard(location / "part.parquet") == entry
    assert file_hash(location / "part.parquet") == entry.sha256
    assert describe_file(location / "part.parquet").bytes == entry.bytes
    (location / "part.parquet").remove()
    (location / "part.parquet").remove()
    with pytest.raises(DataError, match=r"lacks 1 of its 2 files, the first being part\.parquet"):
        load(location, "pairs", artifact.fingerprint)
    with pytest.raises(DataError, match=r"part\.parquet"):
        read_shard(location / "part.parquet")


def test_writers_of_one_pointer_at_once_leave_one_of_their_contents_whole(place: Location):
    contents = [json.dumps({"version": i, "more": "x" * i}).encode() for i in range(12)]
    (place / "latest.json").write_bytes(contents[0])
    with ThreadPoolExecutor(8) as threads:
        seen = [threads.submit((place / "latest.json").read_bytes) for _ in range(12)]
        list(threads.map((place / "latest.json").write_bytes, contents))
    assert (place / "latest.json").read_bytes() in contents
    assert {future.result() for future in seen} <= set(contents)


def test_a_model_is_copied_once_and_again_when_it_changes(
    store: ObjectStore, place: Location, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DPO_RAY_CACHE", str(tmp_path / "cache"))
    uri = upload(small_model, f"{place.name}/model")
    folder = resolve(uri)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {f.name: f.read_bytes() for f in small_model.iterdir()}
    assert resolve(uri) == folder
    (Location.of(uri) / "README.md").write_bytes(b"another")
    assert resolve(uri) != folder and (resolve(uri) / "README.md").is_file()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve(f"{uri}-2")
