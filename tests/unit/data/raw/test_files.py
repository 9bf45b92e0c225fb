"""Reading the rows of a part of a raw file."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray.data.raw import parquet
from dpo_ray.data.raw.files import SUFFIXES, Stamp, encoding_of, open_lines
from dpo_ray.data.raw.json_lines import Unreadable
from dpo_ray.data.raw.parts import Part, RawPart
from dpo_ray.data.raw.read import read_rows
from dpo_ray.errors import DataError
from dpo_ray.storage.location import Location

CODECS = {"": None, ".gz": "gzip", ".zst": "zstd"}


def write_lines(path: Path, data: bytes) -> Path:
    """The bytes as a file, compressed as its name says."""
    codec = CODECS[path.suffix if path.suffix in CODECS else ""]
    path.write_bytes(data if codec is None else compressed(data, codec))
    return path


def compressed(data: bytes, codec: str) -> bytes:
    return pa.compress(data, codec=codec, asbytes=True) if codec == "zstd" else gzip.compress(data)


def read(path: Path, part: Part | None = None, stamp: Stamp | None = None) -> list[tuple[int, Any]]:
    return list(read_rows(RawPart(str(path), part, stamp=stamp)))


@pytest.mark.parametrize("suffix", itertools.chain(*SUFFIXES))
def test_every_suffix_of_a_folder_names_an_encoding(suffix: str):
    form = encoding_of(f"s3://bucket/train-00000-of-00002{suffix}")
    assert form.is_table == (suffix in {".parquet", ".arrow"})
    assert form.codec == CODECS.get("." + suffix.rsplit(".", 1)[1])
    assert encoding_of(f"s3://bucket/train{suffix}?region=eu-west-1") == form
    assert encoding_of(f"train{suffix.upper()}") == form


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_file_that_is_named_itself_may_be_called_json(name: str):
    assert encoding_of(name).kind == "json"


@pytest.mark.parametrize("name", ["README.md", "a.txt", "a.gz", "a.parquet.gz", "jsonl"])
def test_a_name_that_tells_no_encoding_is_an_error_with_the_way_out(name: str):
    with pytest.raises(DataError, match=rf"{name} has none of the suffixes .*\.parquet, \.jsonl.*\.csv.*Rename"):
        encoding_of(name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_lines_are_numbered_from_1_and_blank_ones_skipped(tmp_path: Path, name: str):
    path = write_lines(tmp_path / name, b'\xef\xbb\xbf{"a": 1}\r\n \r\n{"a": \n\n{"a": 2}')
    assert read(path) == [(1, {"a": 1}), (3, Unreadable("malformed_json", '{"a": ')), (5, {"a": 2})]


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_compressed_files_one_after_the_other_are_one_file(tmp_path: Path, codec: str):
    path = tmp_path / ("a.jsonl.gz" if codec == "gzip" else "a.jsonl.zst")
    path.write_bytes(compressed(b'{"a": 1}\n', codec) + compressed(b'{"a": 2}\n', codec))
    assert [row for _, row in read(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"plain", lambda b: b[:-1]])
def test_damaged_compression_is_an_error_that_names_the_file(tmp_path: Path, name: str, damage: Any):
    path = write_lines(tmp_path / name, b'{"a": 1}\n' * 1000)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{name} is damaged.*Write it again"):
        read(path)


def test_a_part_of_plain_lines_is_read_from_its_place(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", b'{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
    assert read(path, Part(2, 1, offset=9, length=10)) == [(3, {"a": 2})]


def test_a_file_that_changed_after_it_was_cut_is_an_error(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": 2}\n')
    stamp = Stamp.of(Location.of(path))
    part = Part(1, 2, offset=0, length=18)
    assert len(read(path, part, stamp)) == 2
    write_lines(path, b'{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl has changed"):
        read(path, part, stamp)
    # The same size and, as some file systems tell it, the same time: the rows are counted, too.
    write_lines(path, b'{"a": 123456789}\n\n')
    now = Stamp.of(Location.of(path))
    assert now.size == 18
    with pytest.raises(DataError, match=r"a\.jsonl has changed"):
        read(path, part, now)


def test_a_file_that_is_gone_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"none\.parquet"):
        read(tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"none\.parquet is not there"):
        read(tmp_path / "none.parquet", stamp=Stamp(str(tmp_path / "none.parquet"), 1, 1))


@pytest.mark.parametrize("group", [1, 3, 7, 100])
@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_a_part_of_parquet_is_its_rows_whatever_the_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, at_once: int
):
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", at_once)
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"a": range(20)}), path, row_group_size=group)
    for first in range(0, 22, 3):
        for count in (0, 1, 5, 100):
            expected = [(n, {"a": n}) for n in range(first, min(first + count, 20))]
            assert read(path, Part(first, count)) == expected
    assert len(read(path)) == 20


def test_only_the_columns_asked_for_are_read(tmp_path: Path):
    path = tmp_path / "f.parquet"
    made = pa.array([10**17], pa.timestamp("ms"))  # later than Python's last year
    pq.write_table(pa.table({"a": [1], "made": made, "b": ["x"]}), path)
    assert list(read_rows(RawPart(str(path)), {"b", "a", "absent"})) == [(0, {"a": 1, "b": "x"})]
    with pytest.raises(DataError, match=r"f\.parquet holds values in rows 0 to 0 that Python cannot hold"):
        read(path)


TEXTS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


def not_utf8(type_: pa.DataType) -> pa.Array:
    """Three texts, the second of which is not UTF-8."""
    raw = pa.array([b"good", b"b\xffd", b"fine"], pa.large_binary() if pa.types.is_large_string(type_) else pa.binary())
    if pa.types.is_dictionary(type_):
        values = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
        return pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), values)
    return pa.Array.from_buffers(type_, 3, raw.buffers())


@pytest.mark.parametrize("type_", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_text_that_is_not_utf8_costs_its_row_only(tmp_path: Path, type_: pa.DataType, nested: bool):
    texts = not_utf8(type_)
    column = texts
    if nested:
        roles = pa.array(["user"] * 3)
        column = pa.ListArray.from_arrays(
            pa.array([0, 1, 2, 3]), pa.StructArray.from_arrays([roles, texts], ["r", "c"])
        )
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"a": column, "n": [1, None, 3]}), path)

    def value(text: str) -> Any:
        return [{"r": "user", "c": text}] if nested else text

    (_, first), (_, bad), (_, last) = read(path)
    assert (first, last) == ({"a": value("good"), "n": 1}, {"a": value("fine"), "n": 3})
    assert isinstance(bad, Unreadable) and bad.reason == "invalid_utf8"
    assert json.loads(bad.raw) == {"a": value("b\\xffd"), "n": None}


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no parquet"])
def test_what_is_not_parquet_is_an_error_that_names_the_file(tmp_path: Path, damage: Any):
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"f\.parquet is not a readable Parquet file"):
        read(path)


def test_lines_are_decompressed_as_they_are_read(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl.gz", b'{"a": 1}\n' * 1_000_000)
    before = pa.total_allocated_bytes()
    with open_lines(Location.of(path)) as lines:
        assert next(lines) == (b'{"a": 1}', 9)
        assert pa.total_allocated_bytes() - before < 5_000_000
