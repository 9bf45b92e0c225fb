"""A folder of files in several formats and of several kinds, through ingest and into the report, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.data.raw.files import Stamp
from dpo_ray.data.raw.scan import read_record
from dpo_ray.errors import DataError
from dpo_ray.storage.artifact import Artifact, read_shard
from dpo_ray.storage.location import Location
from pipelines.context import RunContext
from pipelines.data_report import report_data
from pipelines.deduplicate import deduplicate
from pipelines.ingest import FILES, ingest
from pipelines.tokenize import tokenize
from tests.unit.formats.card import Card, write
from tests.unit.formats.known.cards import CARDS
from tests.unit.pipelines.test_plan import here

MIXED = {
    "a.parquet": "implicit_prompt",
    "b.jsonl": "hh_rlhf",
    "c.json": "alpaca",
    "d.arrow": "helpsteer",
    "e.jsonl": "arena",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of each format, with the rows of its first card; prompts are its own, for duplicates are left out."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file, name in MIXED.items():
        write(_own(CARDS[name][0], file), folder / file)
    return folder


def _own(card: Card, file: str) -> Card:
    def own(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("Why", f"Why {file}").replace("Who", f"Who {file}")
        if isinstance(value, list):
            return [own(entry) for entry in value]
        return {key: own(inner) for key, inner in value.items()} if isinstance(value, dict) else value

    return Card(card.source, card.types, own(card.rows), card.pairs, card.dropped)


def config(folder: Path, model: Path, **more: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "n", "output": str(folder / "out")},
            "model": {"path": str(model)},
            "data": {"train": str(folder / "data" / "*"), "max_quarantined_fraction": 1.0, **more},
        }
    )


def ingested(settings: Config) -> tuple[RunContext, Artifact]:
    context = RunContext.start(settings, "r")
    with here():
        return context, ingest(context)


def rows_of(pairs: Artifact) -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for shard in pairs.shards() for row in read_shard(shard).to_pylist()]


def test_files_of_several_formats_become_pairs_together_and_the_report_names_them(data: Path, tiny_model: Path):
    context, pairs = ingested(config(data.parent, tiny_model))
    assert context.formats == dict.fromkeys(sorted(MIXED.values()), 1)
    expected = [(pair[1], pair[2]) for name in MIXED.values() for pair in CARDS[name][0].pairs]
    assert sorted(rows_of(pairs), key=str) == sorted(expected, key=str)
    with here():
        left_out = deduplicate(context, pairs)
        found = report_data(context, pairs, left_out, tokenize(context, pairs, left_out)).manifest.metrics
    assert found["formats"] == context.formats
    assert found["quarantined"]["tie"] == 2 and found["quarantined"]["bad_transcript"] == 1


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_pairs_are_the_same_however_the_files_are_cut(data: Path, tiny_model: Path, rows: int):
    _, whole = ingested(config(data.parent, tiny_model))
    _, parts = ingested(config(data.parent, tiny_model, rows_per_shard=rows))
    assert rows_of(parts) == rows_of(whole)
    assert len(parts.shards()) == sum(-(-len(CARDS[name][0].rows) // rows) for name in MIXED.values())
    assert {k: v for k, v in parts.manifest.counters.items() if v} == {
        k: v for k, v in whole.manifest.counters.items() if v
    }


def test_what_was_looked_through_is_not_opened_again_to_tell_its_format(
    data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = config(data.parent, tiny_model)
    _, before = ingested(settings)
    stamps = [Stamp.of(Location.of(data / file)) for file in MIXED]
    folder = Location.of(data.parent / "out") / FILES
    assert all(read_record(folder, stamp, "auto") is not None for stamp in stamps)

    def opened(*arguments: Any) -> Any:
        raise AssertionError("a file was opened")

    for place in ("dpo_ray.data.raw.scan.peek", "pipelines.ingest.peek", "dpo_ray.shards.ingest.read_rows"):
        monkeypatch.setattr(place, opened)
    context, again = ingested(settings)
    assert again.fingerprint == before.fingerprint and len(context.formats) == len(MIXED)


def test_another_format_of_the_same_file_makes_other_pairs_of_that_file_alone(data: Path, tiny_model: Path):
    row = {"prompt": "Q?", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
    (data / "f.jsonl").write_text(json.dumps(row) + "\n")
    files = {"train": str(data / "f.jsonl")}
    _, helpful = ingested(config(data.parent, tiny_model, **files))
    _, safe = ingested(config(data.parent, tiny_model, **files, layout="pku_saferlhf_safer"))
    assert (rows_of(helpful), rows_of(safe)) == ([("a", "b")], [("b", "a")])


def test_a_file_that_two_formats_fit_stops_the_run_and_names_them(data: Path, tiny_model: Path, write_preferences: Any):
    write_preferences(
        data, [{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": True}], name="x.parquet"
    )
    with pytest.raises(DataError, match=r"x\.parquet may be read in 2 ways.*paired \(.*unpaired \("):
        ingested(config(data.parent, tiny_model))


def test_quarantine_names_the_row_of_the_file(data: Path, tiny_model: Path):
    _, pairs = ingested(config(data.parent, tiny_model, train=str(data / "c.json")))
    [file] = pairs.quarantines()
    [bad] = pq.read_table(file.uri).to_pylist()
    assert (bad["source"], bad["row"], bad["reason"]) == (str(data / "c.json"), 3, "null_field")
    assert json.loads(bad["raw"])["rejected"] is None
