"""Every file and row of the dirty set, judged as its expected.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dpo_ray.config import Data
from dpo_ray.data.raw.parts import RawPart
from dpo_ray.data.raw.read import read_rows
from dpo_ray.data.rules import REASONS
from dpo_ray.errors import DataError
from dpo_ray.formats.registry import recognise
from dpo_ray.shards.ingest import IngestShard, RawShard
from dpo_ray.shards.output import ShardOutput
from tests.dialogues import stored

# Rows that expected.json leaves to a policy, where ours is to keep the row here, and why.
KEPT = {
    "d035": "200,000 characters are under data.max_characters; the limits in tokens decide, by dropping or cutting",
    "d036": "the same, for an answer",
    "d037": "a copy of d001: duplicates are found over all shards together, in a stage of their own",
    "d038": "d002 with its answers swapped: contradictions likewise",
}
# Rows that expected.json calls bad, and that are pairs here, and why.
TAKEN = {
    "d026": "an answer of three messages",
    "d033": "dialogues that part at the assistant's first turn: the prompt is what both begin with",
}


@pytest.fixture
def dirty(real_data: Path) -> Path:
    return real_data / "dirty"


def listed(dirty: Path, file: str) -> dict[str, Any]:
    return json.loads((dirty / "expected.json").read_text())["files"][file]


def ingested(path: Path, max_characters: int = Data().max_characters) -> ShardOutput:
    ingest = IngestShard(0.0, 0, max_characters=max_characters)
    return ingest(RawShard(RawPart(str(path)), "paired", None))


def reasons_by_row(path: Path, **options: Any) -> dict[int, list[str]]:
    """Number of each row that counts as one → its reasons, none for a kept row."""
    output = ingested(path, **options)
    bad = {} if output.quarantine is None else {q["row"]: [q["reason"]] for q in output.quarantine.to_pylist()}
    read = [number for number, _ in read_rows(RawPart(str(path)))]
    assert output.counters["read"] == len(read) == output.table.num_rows + len(bad)
    return {number: bad.get(number, []) for number in read}


def expected_by_row(entries: list[dict[str, Any]]) -> dict[int, list[str]]:
    return {entry.get("line", entry.get("index")): entry["reasons"] for entry in entries}


@pytest.mark.parametrize("file", ["dirty.jsonl", "dirty.parquet"])
def test_every_row_is_judged_as_expected(dirty: Path, file: str):
    about = listed(dirty, file)
    entries = [entry for entry in about["expect"] if entry["reasons"] != ["blank_line"]]
    assert len(about["expect"]) == about["rows"]
    assert all(entry.get("policy") for entry in entries if entry["row_id"] in KEPT)
    good = {*KEPT, *TAKEN}
    ours = [{**entry, "reasons": [] if entry["row_id"] in good else entry["reasons"]} for entry in entries]
    assert reasons_by_row(dirty / file) == expected_by_row(ours)


@pytest.mark.parametrize("file", ["dirty.jsonl", "dirty.parquet"])
def test_under_a_lower_limit_rows_of_200_000_characters_are_too_long_here(dirty: Path, file: str):
    found = reasons_by_row(dirty / file, max_characters=100_000)
    for entry in listed(dirty, file)["expect"]:
        if entry["row_id"] in {"d035", "d036"}:
            assert found[entry.get("line", entry.get("index"))] == entry["reasons"] == ["too_long"]


@pytest.mark.parametrize("file", ["invalid_utf8.parquet", "bom_crlf.jsonl"])
def test_every_row_of_the_small_files_is_judged_as_expected(dirty: Path, file: str):
    assert reasons_by_row(dirty / file) == expected_by_row(listed(dirty, file)["expect"])


def test_of_dialogues_that_part_earlier_than_at_the_end_the_prompt_is_what_both_begin_with(dirty: Path):
    expected = expected_by_row(listed(dirty, "implicit_prompt.parquet")["expect"])
    found = reasons_by_row(dirty / "implicit_prompt.parquet")
    [parted] = [number for number, reasons in expected.items() if reasons == ["diverging_prefix"]]
    assert found == {**expected, parted: []}
    row = ingested(dirty / "implicit_prompt.parquet").table.to_pylist()[parted]
    assert [m["content"] for m in row["prompt"]] == ["Hi"]
    sides = [[(m["role"], m["content"]) for m in row[f"{side}_turns"]] for side in ("chosen", "rejected")]
    assert sides == [
        [("assistant", "Hello!"), ("user", "Joke?"), ("assistant", "Knock knock.")],
        [("assistant", "Hey."), ("user", "Joke?"), ("assistant", "No.")],
    ]


@pytest.mark.parametrize("file", ["string_columns.parquet", "other_types.parquet", "zero_rows.parquet"])
def test_every_row_of_the_good_files_is_kept(dirty: Path, file: str):
    about = listed(dirty, file)
    output = ingested(dirty / file)
    assert output.table.num_rows == output.counters["read"] == about["valid"] == about["rows"]


def test_the_implicit_prompts_have_the_expected_lengths(dirty: Path):
    lengths = listed(dirty, "implicit_prompt.parquet")["expected_prompt_lengths_in_messages"]
    found = [len(prompt) for prompt in ingested(dirty / "implicit_prompt.parquet").table["prompt"].to_pylist()]
    assert found == [1 if length is None else length for length in lengths]


def test_what_is_kept_is_kept_character_by_character(dirty: Path):
    raw = pq.read_table(dirty / "dirty.parquet").to_pylist()
    good = [raw[number] for number, reasons in reasons_by_row(dirty / "dirty.parquet").items() if not reasons]
    kept = ingested(dirty / "dirty.parquet").table.to_pylist()
    assert [(stored(r["prompt"]), stored(r["chosen"]), stored(r["rejected"])) for r in good] == [
        (row["prompt"], *(turns(row, side) for side in ("chosen", "rejected"))) for row in kept
    ]


def turns(row: dict[str, Any], side: str) -> list[dict[str, Any]]:
    return row[f"{side}_turns"] or stored([{"role": "assistant", "content": row[side]}])


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("truncated", "is not a readable Parquet file"),
        ("not_parquet", "is not a readable Parquet file"),
        ("zero_bytes", "is not a readable Parquet file"),
        ("damaged_page", "is damaged: rows 0 to 7 cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(dirty: Path, file: str, why: str):
    assert listed(dirty, f"{file}.parquet")["readable"] is False
    with pytest.raises(DataError, match=rf"{file}\.parquet {why}"):
        ingested(dirty / f"{file}.parquet")


def test_a_file_without_a_column_is_an_error_that_names_file_and_column(dirty: Path):
    columns = pq.read_schema(dirty / "missing_column.parquet").names
    with pytest.raises(DataError, match=r"missing_column\.parquet has no column rejected"):
        recognise(columns, [], "missing_column.parquet", option="auto", names={})


def test_numbers_are_never_taken_for_text(dirty: Path):
    assert reasons_by_row(dirty / "int_content.parquet") == {row: ["non_string_content"] for row in range(3)}


def test_every_reason_of_the_list_is_one_of_ours_or_has_its_place_elsewhere(dirty: Path):
    elsewhere = {
        "blank_line",  # no row
        "duplicate",  # of rows among each other
        "contradiction",
        "corrupt_file",  # of files: errors that name them
        "bad_schema",
        "empty_file",  # no error
    }
    codes = set(json.loads((dirty / "expected.json").read_text())["reason_codes"])
    assert codes - set(REASONS) == elsewhere
