"""Files that appear whole or not at all, and how paths name them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpo_ray.errors import ConfigError, StorageError
from dpo_ray.storage.location import Location, find_files


def place(path: Path, how: str) -> str:
    """A local path as it is, or by the way that object stores take."""
    return str(path) if how == "local" else f"file://{path}"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards and a note; an older shard further down."""
    for name in ("b.parquet", "a.parquet", "notes.txt", "old/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_local_path_becomes_absolute_and_a_uri_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert Location.of("out").uri == str(tmp_path / "out")
    assert Location.of("s3://bucket/prefix/").uri == "s3://bucket/prefix"
    assert (Location.of("s3://bucket") / "x").uri == "s3://bucket/x"
    assert Location.of("s3://bucket/x").name == "x"


def test_a_written_file_reads_back_and_leaves_nothing_else(tmp_path: Path):
    target = Location.of(tmp_path) / "deep" / "file"
    target.write_bytes(b"one")
    target.write_bytes(b"two")
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path / "deep") == ["file"]


def test_a_write_that_fails_keeps_the_old_content_and_leaves_no_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = Location.of(tmp_path) / "file"
    target.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        target.write_bytes(b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_reading_a_missing_file_raises_file_not_found(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        (Location.of(tmp_path) / "none").read_bytes()


def test_a_list_is_sorted_and_hides_unfinished_files(tmp_path: Path):
    for name in ("b", "a", ".c.123.partial"):
        (tmp_path / name).write_bytes(b"")
    assert [child.name for child in Location.of(tmp_path).children()] == ["a", "b"]


def test_the_list_of_a_missing_folder_is_empty(tmp_path: Path):
    missing = Location.of(tmp_path) / "none"
    assert missing.children() == []
    assert not missing.exists()


def test_a_copy_has_the_same_bytes(tmp_path: Path):
    here, there = Location.of(tmp_path) / "a", Location.of(tmp_path) / "sub" / "b"
    here.write_bytes(b"\x00\xff")
    here.copy_to(there)
    assert there.read_bytes() == b"\x00\xff"


def test_a_folder_is_copied_with_its_folders_and_without_unfinished_files(tmp_path: Path):
    folder = Location.of(tmp_path / "from")
    for name in ("config.json", "additional_chat_templates/tool_use.jinja", ".a.partial", ".hidden/b"):
        (folder / name).write_bytes(name.encode())
    assert folder.names() == ["additional_chat_templates/tool_use.jinja", "config.json"]
    folder.copy_folder_to(Location.of(tmp_path / "to"))
    copied = Location.of(tmp_path / "to")
    assert copied.names() == folder.names()
    assert (copied / "additional_chat_templates/tool_use.jinja").read_bytes().endswith(b"tool_use.jinja")


def test_the_words_of_a_store_are_no_fault_of_the_file():
    refused = OSError("When reading information for key 'f': AWS Error ACCESS_DENIED during HeadObject operation")
    with pytest.raises(StorageError, match=r"s3://bucket/f could not be read or written.*credentials"):
        Location.of("s3://bucket/f").raise_for_store(refused)
    Location.of("s3://bucket/f").raise_for_store(OSError("zlib inflate failed: incorrect header check"))
    Location.of("/data/f").raise_for_store(refused)


@pytest.mark.parametrize("how", ["local", "uri"])
def test_a_file_names_itself(shards: Path, how: str):
    # Even with another suffix: who names a file means it.
    assert [f.uri for f in find_files(place(shards / "notes.txt", how), ".parquet")] == [
        place(shards / "notes.txt", how)
    ]


@pytest.mark.parametrize("how", ["local", "uri"])
def test_a_folder_names_the_files_with_the_suffix_below_it(shards: Path, how: str):
    names = ["a.parquet", "b.parquet", "old/c.parquet"]
    assert [f.uri for f in find_files(place(shards, how), ".parquet")] == [place(shards / n, how) for n in names]


@pytest.mark.parametrize("how", ["local", "uri"])
def test_a_folder_may_hold_several_kinds_of_files(shards: Path, how: str):
    names = ["a.parquet", "b.parquet", "notes.txt", "old/c.parquet"]
    found = find_files(place(shards, how), (".parquet", ".txt"))
    assert [f.uri for f in found] == [place(shards / n, how) for n in names]


@pytest.mark.parametrize("how", ["local", "uri"])
def test_unfinished_and_hidden_files_of_a_folder_are_no_data(tmp_path: Path, how: str):
    # The folder itself may be hidden: it was named.
    folder = tmp_path / "_cache"
    for name in ("a.parquet", "_temporary/0/b.parquet", ".cache/c.parquet", "_metadata.parquet", "sub/.d.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert [f.uri for f in find_files(place(folder, how), ".parquet")] == [place(folder / "a.parquet", how)]


@pytest.mark.parametrize("how", ["local", "uri"])
def test_a_glob_names_its_matches_and_not_those_further_down(shards: Path, how: str):
    names = ["a.parquet", "b.parquet"]
    found = find_files(place(shards / "*.parquet", how), ".parquet")
    assert [f.uri for f in found] == [place(shards / n, how) for n in names]


@pytest.mark.parametrize("how", ["local", "uri"])
def test_what_is_not_there_names_nothing(tmp_path: Path, how: str):
    assert find_files(place(tmp_path / "none", how), ".parquet") == []
    assert find_files(place(tmp_path / "none" / "*.parquet", how), ".parquet") == []


def test_a_writable_folder_is_probed_without_a_trace(tmp_path: Path):
    (Location.of(tmp_path) / "out").require_writable()
    assert os.listdir(tmp_path / "out") == []


def test_an_output_that_is_a_file_cannot_be_written_to(tmp_path: Path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"run\.output is .*out"):
        (Location.of(tmp_path) / "out").require_writable()


@pytest.mark.parametrize("how", ["local", "uri"])
def test_removing_a_file_that_is_not_there_is_no_error(tmp_path: Path, how: str):
    target = Location.of(place(tmp_path / "file", how))
    target.remove()
    target.write_bytes(b"x")
    target.remove()
    assert not target.exists()


def test_a_file_tells_when_it_was_written_and_where_it_lies(tmp_path: Path):
    file = Location.of(tmp_path) / "folder" / "x"
    assert file.written() is None
    file.write_bytes(b"")
    os.utime(file.uri, (1234.5, 1234.5))
    assert file.written() == 1234.5
    assert file.parent == Location.of(tmp_path) / "folder"
    assert Location.of("s3://bucket/a/b").parent.uri == "s3://bucket/a"


def test_folders_are_told_with_their_times_and_files_are_not(tmp_path: Path):
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (100.5, 100.5))
    (tmp_path / "file").write_bytes(b"")
    assert Location.of(tmp_path).folders() == {"a": 100.5, "b": 100.5}
    assert Location.of(tmp_path / "none").folders() == {}


def test_a_file_whose_name_could_be_a_pattern_is_that_file(tmp_path: Path):
    for name in ("pairs[1].jsonl", "pairs1.jsonl"):
        (tmp_path / name).write_text("")
    assert [f.name for f in find_files(str(tmp_path / "pairs[1].jsonl"), "")] == ["pairs[1].jsonl"]
    assert [f.name for f in find_files(str(tmp_path / "pairs[12].jsonl"), "")] == ["pairs1.jsonl"]
