"""Raw files of every kind, looked through on Ray once and ingested."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command_line import CONFIGS, Finished, overrides, shards_of, summary_of

pytestmark = pytest.mark.ray


def row(number: int) -> dict[str, str]:
    return {"prompt": f"Name the number after {number}.", "chosen": f"It is {number + 1}.", "rejected": "Who knows."}


def lines(first: int, count: int) -> bytes:
    return b"".join(json.dumps(row(n)).encode() + b"\n" for n in range(first, first + count))


def ingest(folder: Path, run: Callable[..., Finished], **more) -> Finished:
    values = {
        "run__output": str(folder / "out"),
        "model__path": "/not/needed",
        "data__train": [str(folder / "data"), str(folder / "more" / "*.zst")],
        "data__rows_per_shard": 4,
        **more,
    }
    return run("ingest", str(CONFIGS / "align_cpu.yaml"), *overrides(**values))


def test_files_of_every_kind_are_read_once_and_bad_lines_are_named_by_their_file(one_ray, tmp_path: Path):
    data, more = tmp_path / "data", tmp_path / "more"
    data.mkdir()
    more.mkdir()
    pq.write_table(pa.Table.from_pylist([row(n) for n in range(10)]), data / "small-groups.parquet", row_group_size=3)
    pq.write_table(pa.Table.from_pylist([row(n) for n in range(10, 30)]), data / "one-group.parquet")
    (data / "plain.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(30, 10))
    (data / "packed.jsonl.gz").write_bytes(gzip.compress(lines(40, 5) + b"\n{broken\n" + lines(45, 5)))
    (more / "packed.jsonl.zst").write_bytes(pa.compress(lines(50, 10), codec="zstd", asbytes=True))
    (data / "README.md").write_text("no data")

    done = ingest(tmp_path, one_ray)
    assert done.code == 0, done.log
    assert done.lines("looking through 5 files")
    stage = summary_of(tmp_path / "out")["stages"]["ingest"]
    assert stage["rows"] == {"in": 61, "kept": 60, "dropped": {"malformed_json": 1}}
    files = shards_of(tmp_path / "out", "pairs", stage["fingerprint"])
    kept = [r["chosen"] for shard in files for r in pq.read_table(shard).to_pylist()]
    assert sorted(kept) == sorted(row(n)["chosen"] for n in range(60))
    [quarantine] = (tmp_path / "out" / "artifacts" / "pairs" / "shards" / "quarantine").iterdir()
    assert pq.read_table(quarantine).to_pylist() == [
        {"source": str(data / "packed.jsonl.gz"), "row": 7, "reason": "malformed_json", "raw": "{broken"}
    ]

    again = ingest(tmp_path, one_ray)
    assert again.code == 0, again.log
    assert not again.lines("looking through")
    assert summary_of(tmp_path / "out")["stages"]["ingest"]["reused"]

    # A file that moved is hashed, and its rows are known; a new one costs its own parts.
    (data / "packed.jsonl.gz").rename(data / "z.jsonl.gz")
    (data / "zz.jsonl").write_bytes(lines(60, 5))
    third = ingest(tmp_path, one_ray)
    assert third.code == 0, third.log
    assert third.lines("looking through 2 files")
    assert third.lines("17 of 19 shards are finished already, 2 to compute")


def test_files_that_a_first_look_takes_for_good_are_told_at_once_when_they_are_not(one_ray, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "more").mkdir()
    for name in ("a", "b"):
        packed = gzip.compress(lines(0, 40_000))  # a first look reads a megabyte
        (data / f"{name}.jsonl.gz").write_bytes(packed[:-100])
    (data / "good.jsonl").write_bytes(lines(0, 5))
    done = ingest(tmp_path, one_ray, data__train=str(data))
    assert done.code == 3, done.log
    paragraph = done.log.strip().splitlines()[-1]
    assert "2 files cannot be used" in paragraph
    assert "a.jsonl.gz" in paragraph and "b.jsonl.gz" in paragraph
    # What was read well is not read again.
    (data / "a.jsonl.gz").unlink()
    (data / "b.jsonl.gz").unlink()
    done = ingest(tmp_path, one_ray, data__train=str(data))
    assert done.code == 0, done.log
    assert not done.lines("looking through")
