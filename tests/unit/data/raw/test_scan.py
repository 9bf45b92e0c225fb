"""Looking at raw files and scanning them."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.data.raw import scan as raw_scan
from dpo_ray.data.raw.files import Stamp
from dpo_ray.data.raw.json_lines import Unreadable
from dpo_ray.data.raw.parts import RawPart
from dpo_ray.data.raw.read import read_rows
from dpo_ray.data.raw.scan import FileRecord, map_files, peek, read_record, record_name, require_usable, scan
from dpo_ray.errors import DataError
from dpo_ray.storage.artifact import file_hash
from dpo_ray.storage.location import Location
from tests.unit.data.raw.test_files import write_lines
from tests.unit.data.raw.test_parts import FILES

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def scanned(path: Path, rows: int) -> FileRecord:
    return scan(Stamp.of(Location.of(path)), rows, Location.of(path.parent) / "files")


def part_rows(record: FileRecord, folder: Path) -> list[tuple[int, Any]]:
    """The rows of all parts, each read by itself."""
    found: list[tuple[int, Any]] = []
    for part, source in record.sources(Location.of(folder) / "files"):
        rows = list(read_rows(pickle.loads(pickle.dumps(source))))
        assert len(rows) == part.rows
        assert source.file == record.uri
        found += rows
    return found


def write_rows(path: Path, rows: int, group: int) -> Path:
    table = pa.table({"chosen": [f"c{i}" for i in range(rows)], "rejected": [f"r{i}" for i in range(rows)]})
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.jsonl.zst"])
@given(data=FILES, rows=st.integers(1, 4))
def test_any_bytes_read_in_parts_give_the_rows_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes, rows: int
):
    folder = tmp_path_factory.mktemp("any")
    # A good first row: a file without any is refused as a whole.
    path = write_lines(folder / name, b'{"chosen": 0}\n' + data)
    whole = list(read_rows(RawPart(str(path))))
    assert part_rows(scanned(path, rows), folder) == whole
    lines = (b'{"chosen": 0}\n' + data).split(b"\n")
    filled = [n for n, line in enumerate(lines, start=1) if line.removeprefix(b"\xef\xbb\xbf").strip()]
    assert [number for number, _ in whole] == filled
    assert all(isinstance(row, dict | Unreadable) for _, row in whole)


@pytest.mark.parametrize(("rows", "group"), [(10, 3), (10, 40), (10, 41), (7, 100), (100, 100), (1, 1)])
def test_parts_of_parquet_are_its_rows_once_and_large_row_groups_are_copied(tmp_path: Path, rows: int, group: int):
    path = write_rows(tmp_path / "f.parquet", 100, group)
    record = scanned(path, rows)
    assert (record.copied_to is not None) == (group > 4 * rows)
    assert [part.first for part in record.parts] == list(range(0, 100, rows))
    assert part_rows(record, tmp_path) == [(n, {"chosen": f"c{n}", "rejected": f"r{n}"}) for n in range(100)]
    assert record.sha256 == file_hash(Location.of(path))


@pytest.mark.parametrize("name", ["f.parquet", "f.jsonl.gz"])
def test_a_large_file_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    texts = [random.Random(n).randbytes(500).hex() for n in range(40_000)]  # 40 MB
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"chosen": texts}), tmp_path / name)
    else:
        write_lines(tmp_path / name, b"".join(json.dumps({"chosen": t}).encode() + b"\n" for t in texts))
    del texts
    before, most, rows = pa.total_allocated_bytes(), 0, 0

    def watched(tables: Any, folder: Location) -> list[Any]:
        nonlocal most, rows
        for _, table in tables:
            most, rows = max(most, pa.total_allocated_bytes() - before), rows + table.num_rows
        return []

    monkeypatch.setattr(raw_scan, "copy_parts", watched)
    scanned(tmp_path / name, 1000)
    assert rows == 40_000
    assert most < 10_000_000


def test_a_file_whose_footer_outweighs_its_rows_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_rows(tmp_path / "f.parquet", 200, 1)
    assert scanned(path, 2).copied_to is None
    monkeypatch.setattr(raw_scan, "_FOOTER_BYTES", 0)
    record = scanned(path, 2)
    assert record.copied_to is not None
    assert len(part_rows(record, tmp_path)) == 200


def test_copies_of_any_text_type_are_the_same_rows(tmp_path: Path):
    roles = pa.array(["user", "assistant", "user"]).dictionary_encode()
    texts = pa.array(["a", "b", "c"], pa.large_string())
    message = pa.StructArray.from_arrays([texts, roles], ["content", "role"])
    column = pa.LargeListArray.from_arrays(pa.array([0, 1, 1, 3], pa.int64()), message)
    table = pa.table({"chosen": column, "rejected": pa.array(["x", None, "y"]).dictionary_encode()})
    pq.write_table(pa.concat_tables([table] * 5), tmp_path / "f.parquet")
    record = scanned(tmp_path / "f.parquet", 2)
    assert record.copied_to is not None
    assert record.unusable == {}
    assert part_rows(record, tmp_path) == list(read_rows(RawPart(str(tmp_path / "f.parquet"))))


def test_a_file_that_moved_has_the_same_content_and_takes_its_copy_over(tmp_path: Path):
    path = write_lines(tmp_path / "f.jsonl.gz", b'{"chosen": 1}\n' * 5)
    before = scanned(path, 2)
    [copied] = [p for p in (tmp_path / "files").iterdir() if p.is_dir()]
    written = {p.name: p.stat().st_mtime_ns for p in copied.iterdir()}
    after = scanned(path.rename(tmp_path / "g.jsonl.gz"), 2)
    assert (after.sha256, after.parts, after.copied_to) == (before.sha256, before.parts, before.copied_to)
    assert {p.name: p.stat().st_mtime_ns for p in copied.iterdir()} == written
    assert {source.file for _, source in after.sources(Location.of(tmp_path))} == {str(tmp_path / "g.jsonl.gz")}


def test_a_record_is_found_again_until_the_file_is_written_or_cut_otherwise(tmp_path: Path):
    path = write_lines(tmp_path / "f.jsonl.gz", b'{"chosen": 1}\n' * 5)
    folder, stamp = Location.of(tmp_path) / "files", Stamp.of(Location.of(path))
    record = scan(stamp, 2, folder)
    assert read_record(folder, stamp, 2) is None
    (folder / record_name(stamp, 2)).write_bytes(record.model_dump_json().encode())
    assert read_record(folder, stamp, 2) == record
    assert read_record(folder, stamp, 3) is None
    assert read_record(folder, Stamp(stamp.uri, stamp.size, 0), 2) is None
    assert record.copied_to is not None
    (tmp_path / "files" / record.copied_to / "parts.json").unlink()
    assert read_record(folder, stamp, 2) is None


def test_a_damaged_record_or_copy_says_what_to_remove(tmp_path: Path):
    path = write_lines(tmp_path / "f.jsonl.gz", b'{"chosen": 1}\n' * 5)
    folder, stamp = Location.of(tmp_path) / "files", Stamp.of(Location.of(path))
    record = scan(stamp, 2, folder)
    (folder / record_name(stamp, 2)).write_bytes(b"{}")
    with pytest.raises(DataError, match=r"\.json is not a valid record of .*f\.jsonl\.gz.*Remove it"):
        read_record(folder, stamp, 2)
    [_, (_, second), _] = record.sources(folder)
    assert second.copy is not None
    Path(second.copy).unlink()
    with pytest.raises(DataError, match=r"copy that was made of .*f\.jsonl\.gz.*part-00001.*remove the folder"):
        list(read_rows(second))


def test_a_file_that_is_written_to_while_it_is_scanned_is_an_error(tmp_path: Path):
    path = write_lines(tmp_path / "f.jsonl", b'{"chosen": 1}\n')
    stamp = Stamp.of(Location.of(path))
    write_lines(path, b'{"chosen": 1}\n{"chosen": 2}\n')
    with pytest.raises(DataError, match=r"f\.jsonl was written to while"):
        scan(stamp, 2, Location.of(tmp_path))


def test_a_copy_of_what_was_not_hashed_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_lines(tmp_path / "f.jsonl.gz", b'{"chosen": "old"}\n' * 5)
    old, stamp = path.read_bytes(), Stamp.of(Location.of(path))

    def written_to_after_its_hash(location: Location) -> str:
        found = file_hash(location)
        write_lines(path, b'{"chosen": "another"}\n' * 6)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(raw_scan, "file_hash", written_to_after_its_hash)
        with pytest.raises(DataError, match="was written to while it was read"):
            scan(stamp, 2, Location.of(tmp_path))
    path.write_bytes(old)
    assert part_rows(scanned(path, 2), tmp_path) == [(n, {"chosen": "old"}) for n in range(1, 6)]


def test_a_full_disk_is_not_taken_for_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_lines(tmp_path / "f.jsonl.gz", b'{"chosen": 1}\n')

    def full(self: Location, data: bytes) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Location, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        scanned(path, 2)


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.jsonl.zst"])
def test_compressed_lines_that_end_too_early_are_an_error(tmp_path: Path, name: str):
    path = write_lines(tmp_path / name, b"".join(b'{"chosen": %d}\n' % n for n in range(1000)))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=f"{name} is "):
        scanned(path, 100)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"{name} is empty"):
        peek(Location.of(path))


def test_the_columns_of_lines_are_those_of_the_first_objects(tmp_path: Path):
    path = write_lines(tmp_path / "f.jsonl", b'\n{"prompt": 1, "chosen": 2}\n{\n{"rejected": 3, "prompt": 4}')
    found = peek(Location.of(path))
    assert found.columns == ("prompt", "chosen", "rejected")
    assert found.has_rows


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_lines_is_no_error(tmp_path: Path, data: bytes):
    path = write_lines(tmp_path / "f.jsonl", data)
    assert not peek(Location.of(path)).has_rows
    assert scanned(path, 2).parts == ()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'[\n{"a": 1},\n{"a": 2}\n]', "it is a JSON array: call it .json.*jq -c"),
        (b'[{"a": 1}]', "it is a JSON array: call it .json.*jq -c"),
        ('{"a": 1}\n'.encode("utf-16"), "none of its first 2 rows is a JSON object.*UTF-8"),
        (b"a,b\n1,2", "none of its first 2 rows is a JSON object"),
    ],
)
def test_a_file_that_begins_without_any_object_is_no_file_of_lines(tmp_path: Path, data: bytes, why: str):
    path = write_lines(tmp_path / "f.jsonl", data)
    with pytest.raises(DataError, match=rf"f\.jsonl is not a file of JSON lines: {why}"):
        peek(Location.of(path))


@pytest.mark.parametrize(
    "type_",
    [
        pa.string(),
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.null(),
        MESSAGES,
        pa.large_list(pa.struct([("content", pa.large_string()), ("name", pa.int8()), ("role", pa.string())])),
        pa.list_(pa.null()),
    ],
    ids=str,
)
def test_text_and_messages_are_usable(tmp_path: Path, type_: pa.DataType):
    pq.write_table(pa.table({"chosen": pa.array([], type_)}), tmp_path / "f.parquet")
    found = peek(Location.of(tmp_path / "f.parquet"))
    assert found.unusable == {}
    assert not found.has_rows


@pytest.mark.parametrize(
    "type_",
    [
        pa.int64(),
        pa.binary(),
        pa.list_(pa.string()),
        pa.struct([("role", pa.string()), ("content", pa.string())]),
        pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])),
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.int64())])),
        pa.list_(pa.map_(pa.string(), pa.string())),
    ],
    ids=str,
)
def test_a_column_of_another_type_is_an_error_that_names_it_and_its_type(tmp_path: Path, type_: pa.DataType):
    pq.write_table(
        pa.table({"chosen": pa.array([], type_), "rejected": pa.array([], pa.string())}), tmp_path / "f.parquet"
    )
    found = peek(Location.of(tmp_path / "f.parquet"))
    assert list(found.unusable) == ["chosen"]
    require_usable(found, ["rejected"], "f.parquet")
    with pytest.raises(DataError) as error:
        require_usable(found, ["prompt", "chosen", "rejected"], "f.parquet")
    assert f"its column chosen is {found.unusable['chosen']}" in str(error.value)


def test_what_is_done_to_each_is_told_of_all_bad_ones_at_once():
    def work(number: int) -> int:
        if number % 2:
            raise DataError(f"file {number} is bad.")
        return number

    assert map_files(work, [0, 2, 4]) == [0, 2, 4]
    with pytest.raises(DataError, match=r"^file 3 is bad\.$"):
        map_files(work, [0, 3])
    with pytest.raises(DataError) as error:
        map_files(work, range(40))
    text = str(error.value)
    assert text.startswith("20 files cannot be used. (1) file 1 is bad. (2) file 3 is bad.")
    assert text.endswith("(10) file 19 is bad. And 10 more.")


def test_the_schema_of_the_dirty_files(real_data: Path):
    wanted = ["prompt", "chosen", "rejected"]
    for name in ("dirty", "implicit_prompt", "other_types", "string_columns", "zero_rows", "invalid_utf8"):
        require_usable(peek(Location.of(real_data / "dirty" / f"{name}.parquet")), wanted, name)
    found = peek(Location.of(real_data / "dirty" / "int_content.parquet"))
    with pytest.raises(DataError, match=r"int_content cannot .* chosen is list<.*content: int64.*rejected is list<"):
        require_usable(found, wanted, "int_content")


@pytest.mark.parametrize("name", ["dirty.jsonl", "bom_crlf.jsonl", "dirty.parquet", "other_types.parquet"])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_the_dirty_files_in_parts_give_the_rows_of_the_whole(real_data: Path, tmp_path: Path, name: str, rows: int):
    (tmp_path / name).write_bytes((real_data / "dirty" / name).read_bytes())
    whole = list(read_rows(RawPart(str(tmp_path / name))))
    assert part_rows(scanned(tmp_path / name, rows), tmp_path) == whole
    if name.endswith(".jsonl"):
        packed = write_lines(tmp_path / f"{name}.gz", (tmp_path / name).read_bytes())
        assert part_rows(scanned(packed, rows), tmp_path) == whole


def test_a_damaged_page_is_found_by_the_scan_where_the_file_is_copied(real_data: Path, tmp_path: Path):
    path = tmp_path / "damaged_page.parquet"
    path.write_bytes((real_data / "dirty" / path.name).read_bytes())
    with pytest.raises(DataError, match=r"damaged_page\.parquet is damaged"):
        scanned(path, 1)


def test_parts_of_parquet_follow_what_their_rows_take_in_memory(tmp_path: Path):
    # The same 8 kB in each row are in the file once a row group.
    system, path = "Be brief. " * 800, tmp_path / "f.parquet"
    rows = {"prompt": [f"{system} {n % 7}" for n in range(2000)], "chosen": ["a"] * 2000, "rejected": ["b"] * 2000}
    pq.write_table(pa.table(rows), path, row_group_size=100)
    record = scan(Stamp.of(Location.of(path)), "auto", Location.of(tmp_path / "records"))
    assert path.stat().st_size < 1 << 18 and sum(part.rows for part in record.parts) == 2000
    assert 14 <= len(record.parts) <= 18  # a sixteenth of 16 MB each
