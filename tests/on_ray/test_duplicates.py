"""Duplicates, contradictions and prompts on both sides, over several files and through the stages after them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command_line import CONFIGS, Finished, overrides, shards_of, summary_of

pytestmark = pytest.mark.ray


def pair(number: int, good: str = "It is next.", bad: str = "I will not say.") -> dict:
    return {"prompt": f"Name the number after {number}.", "chosen": good, "rejected": bad}


def swapped(row: dict) -> dict:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def run(one_ray: Callable[..., Finished], folder: Path, tiny_model: Path, command: str) -> Finished:
    return one_ray(
        command,
        str(CONFIGS / "align_cpu.yaml"),
        *overrides(
            run__name="numbers",
            run__output=str(folder / "out"),
            model__path=str(tiny_model),
            data__train=str(folder / "train" / "*.parquet"),
            data__eval=str(folder / "eval" / "*.parquet"),
            data__rows_per_shard=10,
            reference__engine="torch",
            reference__calibration_pairs=4,
        ),
    )


def rows_of(folder: Path, summary: dict, stage: str, kind: str) -> list[dict]:
    files = shards_of(folder / "out", kind, summary["stages"][stage]["fingerprint"])
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def two_runs(one_ray, tmp_path_factory, tiny_model, write_preferences):
    """A run over two training files and a held-out one; then over a third that contradicts a row of the first, and two
    copies of it."""
    folder = tmp_path_factory.mktemp("duplicates")
    first = [pair(n) for n in range(10)]
    # A bad row, a repetition within the file and of another, both sides of one row, and a held-out prompt.
    second = [pair(20), pair(20), pair(3), swapped(pair(4)), pair(100, good="One hundred and one."), pair(21, bad="")]
    write_preferences(folder / "train", first, name="train-0.parquet")
    write_preferences(folder / "train", [*second, *(pair(n) for n in range(200, 230))], name="train-1.parquet")
    write_preferences(folder / "eval", [pair(100), pair(101), pair(101)], name="eval-0.parquet")
    before = run(one_ray, folder, tiny_model, "reference")
    assert before.code == 0, before.log
    summaries = [summary_of(folder / "out")]
    write_preferences(folder / "train", [pair(300), swapped(pair(5))], name="train-2.parquet")
    for copy in ("train-3.parquet", "train-4.parquet"):
        shutil.copy(folder / "train" / "train-2.parquet", folder / "train" / copy)
    after = run(one_ray, folder, tiny_model, "tokenize")
    assert after.code == 0, after.log
    return folder, [before, after], [*summaries, summary_of(folder / "out")]


def test_every_row_read_is_kept_quarantined_or_left_out(two_runs):
    stages = two_runs[2][0]["stages"]
    ingest, duplicates, tokenize = (stages[name]["rows"] for name in ("ingest", "duplicates", "tokenize"))
    left_out = {"duplicate": 3, "contradiction": 2, "prompt_in_eval": 1}
    assert ingest == {"in": 49, "kept": 48, "dropped": {"empty_response": 1}}
    assert duplicates == {"in": 48, "kept": 42, "dropped": left_out}
    assert tokenize == {"in": 48, "kept": 42, "dropped": left_out}
    assert duplicates["kept"] + sum(left_out.values()) + sum(ingest["dropped"].values()) == ingest["in"]


def test_the_log_says_how_many_training_rows_gave_way_to_held_out_ones(two_runs):
    assert two_runs[1][0].lines("[duplicates] training rows left out because their prompts are in data.eval too: 1")


def test_what_is_scored_has_neither_repetitions_nor_contradictions_nor_prompts_on_both_sides(two_runs):
    folder, _, summaries = two_runs
    rows = rows_of(folder, summaries[0], "reference", "reference")
    assert len(rows) == 42 == len({row["pair_id"] for row in rows})
    sides = {row["prompt_id"]: set() for row in rows}
    for row in rows:
        sides[row["prompt_id"]].add(row["split"])
    assert all(len(of_prompt) == 1 for of_prompt in sides.values())
    assert sum(row["split"] == "eval" for row in rows) == 2


def test_new_shards_cost_themselves_and_the_shards_that_they_contradict(two_runs):
    _, (_, after), summaries = two_runs
    # Six shards were tokenized before: 1 of the first file, 4 of the second, 1 held out. The new one and its copies
    # make nine, and the first file has lost a row.
    assert after.lines("[pairs] 6 of 9 shards are finished already, 3 to compute")
    assert after.lines("[tokenized] 5 of 9 shards are finished already, 4 to compute")
    assert summaries[1]["stages"]["tokenize"]["rows"]["kept"] == 42


def test_the_rows_of_a_copied_file_are_duplicates(two_runs):
    stages = two_runs[2][1]["stages"]
    assert stages["ingest"]["rows"]["in"] == 49 + 2 + 2 + 2
    # Of the new file and its copies: one pair three times, and four rows that contradict each other with the old one.
    left_out = {"duplicate": 5, "contradiction": 6, "prompt_in_eval": 1}
    assert stages["duplicates"]["rows"]["dropped"] == left_out
    assert stages["tokenize"]["rows"] == {"in": 48 + 6, "kept": 42, "dropped": left_out}


def test_the_data_report_is_in_the_summary_and_counts_the_same_rows(two_runs):
    folder, _, summaries = two_runs
    data = summaries[0]["data"]
    assert (data["read"], data["quarantined"], data["pairs"]) == (49, {"empty_response": 1}, 42)
    assert data["splits"] == {"eval": 2, "train": 40}
    assert data["left_out"] == {"duplicate": 3, "contradiction": 2, "prompt_in_eval": 1}
    assert data["scripts"] == {"Latin": 42}
    assert data["tokens"]["prompt"]["n"] == data["reference_prefers_chosen"]["sum"]["n"] == 42
    assert "reference_prefers_chosen" not in summaries[1]["data"]
    page = (folder / "out" / "runs" / summaries[0]["run_id"] / "report.html").read_text()
    assert ">Data</h2>" in page
