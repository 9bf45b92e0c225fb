"""What a person is told, as JSON lines for programs."""

from __future__ import annotations

import json
import socket
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import DataError
from dpo_ray.progress import Progress, say
from pipelines.records import RECORDS, Records
from pipelines.terminal import LOG, captured
from tests.unit.pipelines.test_terminal import NOISE
from tests.whole_run import Job, number_rows, word_model

KEYS = ["time", "level", "run", "stage", "shard", "node", "message"]


def read(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def told(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["level"], record["run"], record["stage"], record["shard"], record["message"]


def test_each_line_is_one_object_with_the_same_keys(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    before = datetime.now(UTC) - timedelta(seconds=1)
    with captured(as_json=True) as terminal:
        say("start", "checking")
        terminal.records.run = "aligned-1"
        terminal.keep_log(tmp_path)
        Progress("pairs", 10, "rows").advance(10, shard="3fa9c1d2")
        print("(raylet, ip=10.0.0.2) 1 Workers killed due to memory pressure (OOM)")
        print("\n".join(NOISE))
    captured_lines = capfd.readouterr()
    shown, kept = read(captured_lines.err), read((tmp_path / RECORDS).read_text())
    assert captured_lines.out == ""
    assert [list(record) for record in shown] == [KEYS] * 3
    assert told(shown[0]) == ("info", None, "start", None, "checking")
    assert shown[1]["message"].startswith("10/10 rows · ") and shown[1]["message"].endswith(
        "shard 3fa9c1d2 done · 0:00:00 left"
    )
    assert told(shown[1])[:4] == ("info", "aligned-1", "pairs", "3fa9c1d2")
    assert told(shown[2])[:4] == ("warning", "aligned-1", None, None)
    assert [record["node"] for record in shown] == [socket.gethostname(), socket.gethostname(), "10.0.0.2"]
    assert all(before < datetime.fromisoformat(record["time"]) < datetime.now(UTC) for record in shown)
    # What was said before the run had its folder is in the file with the run's name.
    assert kept == [{**record, "run": "aligned-1"} for record in shown]


def test_the_file_is_written_whatever_the_terminal_shows_and_the_log_has_no_trace_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    with captured() as terminal:
        terminal.keep_log(tmp_path)
        say("train", "checkpoint at step 8/16")
        print('(RayTrainWorker pid=7) \x1e{"time": "2026-11-26T00:00:00.000+00:00", "stage": "train", "shard": null, '
              '"node": "gpu-3"}\x1d[train] from a worker', file=sys.stderr)  # fmt: skip
    assert capfd.readouterr().err == "[train] checkpoint at step 8/16\n[train] from a worker\n"
    assert (tmp_path / LOG).read_text().splitlines() == [
        "[train] checkpoint at step 8/16",
        "(RayTrainWorker pid=7) [train] from a worker",
    ]
    of_worker = read((tmp_path / RECORDS).read_text())[1]
    assert (of_worker["time"], of_worker["node"]) == ("2026-11-26T00:00:00.000+00:00", "gpu-3")
    assert told(of_worker) == ("info", None, "train", None, "from a worker")


def test_an_error_is_the_last_object_and_ends_with_its_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended, captured(as_json=True) as terminal:
        terminal.keep_log(tmp_path)
        raise DataError("data.train is /nowhere.\nName a folder.")
    [last] = read(capfd.readouterr().err)
    assert ended.value.code == DataError.exit_code
    assert last["level"] == "error"
    log = f"The log with all that was said is {tmp_path / LOG}."
    assert last["message"] == f"DataError: data.train is /nowhere.\nName a folder. {log}"
    assert read((tmp_path / RECORDS).read_text()) == [last]


def test_an_error_holds_the_traceback_where_it_is_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DPO_RAY_TRACEBACK", "1")
    with pytest.raises(SystemExit), captured(as_json=True):
        raise ValueError("a defect")
    [last] = read(capfd.readouterr().err)
    assert last["message"].startswith("Traceback") and "Unexpected ValueError: a defect" in last["message"]


def test_a_record_stays_one_line(tmp_path: Path):
    lines: list[str] = []
    Records(lines.append).add("one\ntwo äöü", stage="train")
    [line] = lines
    assert "\n" not in line and json.loads(line)["message"] == "one\ntwo äöü"


def test_a_whole_run_says_nothing_but_objects(tmp_path: Path, small_model: Path):
    job = Job(tmp_path, word_model(tmp_path / "words", small_model))
    job.write("a.jsonl", number_rows(0, 40))
    done = job.run("-o", "run.log_format=json", "--run-id", "first")
    assert done.code == 0, done.log
    records = read(done.log)
    assert [list(record) for record in records] == [KEYS] * len(records)
    assert {record["run"] for record in records} == {None, "first"}
    assert {"start", "ingest", "tokenize", "train", "publish"} <= {record["stage"] for record in records}
    assert "Summary: " in records[-1]["message"]
    kept = read((job.output / "runs" / "first" / RECORDS).read_text())
    assert kept == [{**record, "run": "first"} for record in records]


def test_a_run_that_fails_says_why_in_an_object(tmp_path: Path, small_model: Path):
    job = Job(tmp_path, word_model(tmp_path / "words", small_model))
    done = job.run("-o", "run.log_format=json")
    assert done.code == 3
    *_, last = read(done.log)
    assert last["level"] == "error" and last["run"] is None and "data.train" in last["message"]
