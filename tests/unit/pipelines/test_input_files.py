"""Which files data.train and data.eval name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_ray.errors import DataError
from dpo_ray.storage.location import Location
from pipelines.ingest import input_files, tell_passed_over


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.parquet", "b.jsonl.gz", "c.ndjson", "README.md", "out/artifacts/pairs/x/y.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(folder: Path, *paths: str) -> list[str]:
    given = [str(folder / path) for path in paths]
    found = input_files(given[0] if len(given) == 1 else tuple(given), "data.train", Location.of(folder / "out"))
    return [str(Path(file.uri).relative_to(folder)) for file in found]


def test_a_folder_is_its_files_of_every_format_but_not_the_output(folder: Path):
    assert names(folder, "") == ["a.parquet", "b.jsonl.gz", "c.ndjson"]
    assert names(folder, "**/*.parquet") == ["a.parquet"]


def test_what_may_describe_data_is_taken_where_nothing_else_is(folder: Path):
    for name in (
        "x/a.csv",
        "x/b.json",
        "x/dataset_info.json",
        "y/train/data-0.arrow",
        "y/train/cache-1.arrow",
        "y/state.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "a.csv").write_bytes(b"")
    assert names(folder, "") == ["a.parquet", "b.jsonl.gz", "c.ndjson"]
    assert names(folder, "x") == ["x/a.csv", "x/b.json"]
    assert names(folder, "y") == ["y/train/data-0.arrow"]
    (folder / "out/a.csv").write_bytes(b"")  # beside the output's own Parquet
    assert names(folder, "out") == ["out/a.csv"]
    assert names(folder, "a.csv") == ["a.csv"] and names(folder, "x/*.json") == ["x/b.json"]


def test_what_is_not_read_beside_other_files_is_told(folder: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("x/a.jsonl", "x/b.JSONL", "x/c.csv", "x/d.json", "x/dataset_info.json", "y/a.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    assert names(folder, "x") == ["x/a.jsonl", "x/b.JSONL"]
    out = Location.of(folder / "out")
    tell_passed_over(str(folder / "x"), "data.train", out)
    told = capsys.readouterr().err
    assert f"data.train: of {folder}/x 2 files are read, and 2 with other suffixes are not, as {folder}/x/c.csv" in told
    for path in ("y", "x/*", "x/c.csv"):
        tell_passed_over(str(folder / path), "data.train", out)
    assert capsys.readouterr().err == ""


def test_a_path_that_leads_into_the_output_is_meant(folder: Path):
    assert names(folder, "out/artifacts/pairs") == ["out/artifacts/pairs/x/y.parquet"]
    assert names(folder, "out/artifacts/*/*/*.parquet") == ["out/artifacts/pairs/x/y.parquet"]


def test_several_paths_name_each_file_once_in_their_order(folder: Path):
    assert names(folder, "c.ndjson", "*.parquet", "") == ["c.ndjson", "a.parquet", "b.jsonl.gz"]


def test_each_of_several_paths_must_name_a_file(folder: Path):
    with pytest.raises(
        DataError, match=r"data\.train is .*none, and no file is there.*\.jsonl\.zst.*data\.train=data/"
    ):
        names(folder, "", "none")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match="no file is there"):
        names(folder, "notes")


def test_the_output_is_no_input_however_it_is_spelled(folder: Path, monkeypatch: pytest.MonkeyPatch):
    link = folder.parent / f"{folder.name}-link"
    link.symlink_to(folder)
    monkeypatch.chdir(folder)
    for output in ("out", f"../{folder.name}/out", str(link / "out")):
        found = input_files(str(folder), "data.train", Location.of(output))
        assert [Path(file.uri).name for file in found] == ["a.parquet", "b.jsonl.gz", "c.ndjson"]


def test_the_data_may_lie_beside_the_artifacts_in_the_output(folder: Path):
    found = input_files(str(folder / "out"), "data.train", Location.of(folder))
    assert [Path(file.uri).name for file in found] == ["y.parquet"]
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "shard.parquet").write_bytes(b"")
    found = input_files(str(folder), "data.train", Location.of(folder))
    assert "shard.parquet" not in [Path(file.uri).name for file in found]
