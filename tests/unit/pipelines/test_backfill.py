"""Runs over a period or over named partitions, and what is recorded of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import parse_config
from dpo_ray.errors import ConfigError
from tests.command_line import in_process, summary_of
from tests.whole_run import Job, number_rows


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path, tmp_path)
    for n in (1, 2, 4):
        job.write(f"date=2026-11-0{n}/a.jsonl", number_rows(20 * n, 10 + n))
    return job


def read(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = summary_of(job.output)["input"]
    return found


def test_a_period_is_read_and_recorded_day_by_day(job: Job):
    done = job.run("--since", "2026-11-02", "--until", "2026-11-04", command="ingest")
    assert done.code == 0, done.log
    assert done.lines("26 rows in 2 files (data.since=2026-11-02, data.until=2026-11-04), new: 26 in 2")
    assert done.lines("no file is of 2026-11-03, days of the period")
    assert read(job) == {
        "files": 2,
        "rows": 26,
        "new_files": 2,
        "new_rows": 26,
        "compared_with": None,
        "chosen_by": {"data.since": "2026-11-02", "data.until": "2026-11-04"},
        "days": {"2026-11-02": {"files": 1, "rows": 12}, "2026-11-04": {"files": 1, "rows": 14}},
    }
    [run] = json.loads(in_process("show", str(job.output), "--json").log)["runs"]
    assert list(run["input"]["days"]) == ["2026-11-02", "2026-11-04"]


def test_a_file_without_rows_among_others_is_named(job: Job):
    job.write("date=2026-11-04/b.jsonl", [])
    done = job.run(command="ingest")
    assert done.code == 0 and len(done.lines("1 of 4 files hold no row: ")) == 1, done.log
    assert "date=2026-11-04/b.jsonl" in done.lines("1 of 4 files hold no row: ")[0]


def test_partitions_are_named_and_what_is_read_once_is_read_no_more(job: Job):
    assert job.run("--partition", "date=2026-11-01", "--partition", "date=2026-11-04", command="ingest").code == 0
    assert list(read(job)["days"]) == ["2026-11-01", "2026-11-04"]
    whole = job.run(command="ingest")
    assert whole.lines("[pairs] 4 of 6 shards are finished already, 2 to compute"), whole.log
    assert len(read(job)["days"]) == 3 and read(job)["chosen_by"] == {}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--since", "2026-12-01"], 3, "they are of 2026-11-01 to 2026-11-04. Nothing was done"),
        (["--partition", "date=2026-11-03"], 3, "is in the partition date=2026-11-03"),
        (["--since", "2026-11-02", "--until", "2026-11-01"], 2, "lies before data.since=2026-11-02"),
        (["--since", "yesterday"], 2, "data.since='yesterday'"),
        (["--partition", "2026-11-01"], 2, "data.partitions"),
    ],
)
def test_what_chooses_nothing_is_refused_at_the_start(job: Job, options: list[str], code: int, said: str):
    done = job.run(*options, command="ingest")
    assert done.code == code and said in done.log, done.log
    assert not (job.output / "artifacts").exists()


def test_held_out_data_of_its_own_is_taken_whole(job: Job, tmp_path: Path):
    held_out = job.write("../held-out.jsonl", number_rows(300, 4))
    job.configure(data={"eval": str(held_out), "held_out_fraction": 0.1})
    done = job.run("--since", "2026-11-04", command="ingest")
    assert done.code == 0 and read(job)["rows"] == 18 and list(read(job)["days"]) == ["2026-11-04"], done.log


def test_the_resolved_configuration_and_the_plan_say_what_is_chosen(job: Job):
    shown = in_process("run", str(job.path), "--since", "2026-11-02", "--partition", "date=2026-11-04", "--dry-run")
    assert shown.code == 0 and "since: '2026-11-02'" in shown.log and "- date=2026-11-04" in shown.log
    assert shown.lines("data.since=2026-11-02, data.partitions=date=2026-11-04, held out")


def test_a_given_reference_has_no_files_to_choose_from(job: Job):
    done = in_process("train", str(job.path), "--reference", "x", "--since", "2026-11-02")
    assert done.code == 2 and "data.since=2026-11-02 chooses among files that are not read" in done.log


def test_generated_pairs_have_no_files_to_choose_from():
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "generate": {"prompts": "p"}}
    with pytest.raises(ConfigError, match=r"data\.until chooses among the files of data\.train"):
        parse_config({**tree, "data": {"until": "2026-11-02"}})
