"""JSON arrays, CSV, TSV and Arrow: looked at, scanned, cut into parts and read, as Parquet and lines are."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray.data.raw import scan as raw_scan
from dpo_ray.data.raw.files import Stamp, is_data
from dpo_ray.data.raw.parts import RawPart
from dpo_ray.data.raw.read import read_rows
from dpo_ray.data.raw.scan import FileRecord, peek, read_record, record_name, scan
from dpo_ray.errors import DataError
from dpo_ray.storage.artifact import file_hash
from dpo_ray.storage.location import Location
from tests.unit.data.raw.test_scan import part_rows

NAMES = ("f.json", "f.json.gz", "f.csv", "f.csv.gz", "f.tsv", "f.arrow", "g.arrow")
ROWS: list[dict[str, Any]] = [{"prompt": f"q{n}\n?", "chosen": f'c{n}, "é"', "rejected": None} for n in range(20)]
FIRST = {"f.arrow": 0, "g.arrow": 0}


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".json"):
        data = json.dumps(rows, indent=1).encode()
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(rows, schema=pa.schema([(column, pa.string()) for column in rows[0]]))
        opened = pa.ipc.new_file if name.startswith("g") else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        return path
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        data = path.read_bytes()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def scanned(path: Path, rows: int) -> FileRecord:
    return scan(Stamp.of(Location.of(path)), rows, Location.of(path.parent) / "files")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 3, 20, 1000])
def test_parts_are_the_rows_of_the_whole_each_of_as_many_rows(tmp_path: Path, name: str, rows: int):
    path = write(tmp_path / name)
    record = scanned(path, rows)
    assert record.sha256 == file_hash(Location.of(path))
    assert [part.rows for part in record.parts[:-1]] == [rows] * (len(record.parts) - 1)
    first = FIRST.get(name, 1)
    expected = [(first + n, row) for n, row in enumerate(ROWS)]
    assert part_rows(record, tmp_path) == list(read_rows(RawPart(str(path)))) == expected
    assert [row for _, row in read_rows(RawPart(str(path)), {"chosen"})] == [{"chosen": r["chosen"]} for r in ROWS]
    assert (record.copied_to is None) == (name == "f.json")  # which can be read from the middle


@pytest.mark.parametrize("name", NAMES)
def test_a_look_tells_columns_and_the_first_rows_and_its_record_keeps_them(tmp_path: Path, name: str):
    path = write(tmp_path / name)
    found = peek(Location.of(path))
    assert (found.columns, found.unusable, found.has_rows) == (("prompt", "chosen", "rejected"), {}, True)
    assert found.sample == tuple(ROWS[:16])
    record, folder, stamp = scanned(path, 3), Location.of(tmp_path) / "files", Stamp.of(Location.of(path))
    (folder / record_name(stamp, 3)).write_bytes(record.model_dump_json().encode())
    assert read_record(folder, stamp, 3) == record and record.sample == found.sample


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, name: str):
    path = write(tmp_path / name)
    data = path.read_bytes()
    # A table without its last rows is one that ends early; text is so in the middle of a cell.
    path.write_bytes(
        data[:-9] if name.endswith(".gz") else data[: data.rfind(b'"')] if name[2:] != "arrow" else data[:-50]
    )
    with pytest.raises(DataError, match=rf"{name} (is|cannot)"):
        scanned(path, 3)


def test_an_array_that_changed_after_it_was_cut_is_an_error(tmp_path: Path):
    path = write(tmp_path / "f.json")
    record = scanned(path, 3)
    write(path, ROWS[:5])
    (_, source), *_ = record.sources(Location.of(tmp_path) / "files")
    with pytest.raises(DataError, match=r"f\.json has changed"):
        list(read_rows(source))


@pytest.mark.parametrize("name", ["f.json", "f.json.gz", "f.csv", "f.arrow"])
def test_a_large_file_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    scanned(write(tmp_path / f"small.{name[2:]}"), 3)  # what is imported on the way does not count
    path = write(tmp_path / name, [{"chosen": random.Random(n).randbytes(1000).hex()} for n in range(10_000)])  # 20 MB
    before, most, rows = pa.total_allocated_bytes(), 0, 0

    def watched(tables: Any, folder: Location) -> list[Any]:
        nonlocal most, rows
        for _, table in tables:
            most, rows = max(most, pa.total_allocated_bytes() - before), rows + table.num_rows
        return []

    monkeypatch.setattr(raw_scan, "copy_parts", watched)
    monkeypatch.setattr(raw_scan, "file_hash", lambda location: "")  # which reads 16 MiB at once
    tracemalloc.start()
    try:
        record = scanned(path, 500)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (rows or sum(part.rows for part in record.parts)) == 10_000
    assert most < 8_000_000 and peak < 8_000_000


@pytest.mark.parametrize("data", [b"[]", b" [ \n ] ", b""])
def test_a_file_of_json_without_rows_is_no_error(tmp_path: Path, data: bytes):
    path = tmp_path / "f.json"
    path.write_bytes(data)
    assert not peek(Location.of(path)).has_rows
    assert scanned(path, 2).parts == ()


def test_an_arrow_file_without_rows_is_no_error(tmp_path: Path):
    path = tmp_path / "f.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("chosen", pa.string())])):
        pass
    found = peek(Location.of(path))
    assert (found.columns, found.has_rows) == (("chosen",), False)
    assert scanned(path, 2).parts == ()


def test_a_sample_leaves_columns_out_that_json_has_no_values_for(tmp_path: Path):
    path = tmp_path / "f.arrow"
    table = pa.table({"chosen": ["a"], "image": [b"\xff"], "when": pa.array([10**17], pa.timestamp("ms"))})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert peek(Location.of(path)).sample == ({"chosen": "a"},)


def test_a_row_of_csv_that_is_bad_is_quarantined_alone(tmp_path: Path):
    path = tmp_path / "f.csv"
    path.write_bytes(b"prompt,chosen\nWhy?,So.\nalone\n\xff,No.\n")
    rows = [row for _, row in read_rows(RawPart(str(path)))]
    assert [getattr(row, "reason", row) for row in rows] == [
        {"prompt": "Why?", "chosen": "So."},
        "not_an_object",
        "invalid_utf8",
    ]


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "dataset_dict.json", "cache-0123.arrow"])
def test_what_describes_data_or_is_a_cache_of_them_is_no_data(name: str):
    assert not is_data(name)
    assert is_data("data-00000-of-00001.arrow") and is_data("train.json")


@pytest.mark.parametrize("name", ["f.parquet", "f.arrow", "f.csv"])
def test_columns_that_share_a_name_are_an_error_that_names_it(tmp_path: Path, name: str):
    table = pa.Table.from_arrays(
        [pa.array([text]) for text in "qabc"], names=["prompt", "chosen", "rejected", "chosen"]
    )
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(table, path)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("prompt,chosen,rejected,chosen\nq,a,b,c\n")
    with pytest.raises(DataError, match=rf"{name} .*chosen"):
        peek(Location.of(path))
