"""A run of Weights & Biases, offline: what it holds is read from its file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import WandB
from dpo_ray.storage.location import Location
from dpo_ray.tracking.fan import Fan
from dpo_ray.tracking.record import Record
from dpo_ray.tracking.tracker import Opening, Point
from tests.command_line import summary_of
from tests.whole_run import Job, number_rows, word_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed: make test-wandb has it"),
]

OPTIONS = WandB(project="cards", mode="offline")


def records(data: bytes) -> Iterator[bytes]:
    """Of a file in the form of LevelDB's log: blocks of 32 KiB, in them parts of records, each with a head of 7 bytes
    (checksum, length, which part it is). Before the first one stand 7 bytes of W&B's own."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # the whole of it, or its end
            yield record
            record = b""


def held(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Of an offline run: what it is, its history, and its summary."""
    from wandb.proto import wandb_internal_pb2

    run: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            made = record.run
            config = {item.key: json.loads(item.value_json) for item in made.config.update}
            run = {"id": made.run_id, "group": made.run_group, "job_type": made.job_type, "config": config}
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("history"):
            history.append(
                {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                | {"step": record.history.step.num}
            )
    return run, history, summary


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))


def points(first: int, last: int) -> list[Point]:
    return [Point(step, 100.0 + step, {"train/loss": 1 / step}) for step in range(first, last + 1)]


def begin(tmp_path: Path, name: str) -> tuple[Fan, list[str]]:
    from dpo_ray.tracking.wandb import WandBTracker

    output, told = Location.of(tmp_path), list[str]()
    folder = output / "runs" / name
    Path(folder.uri).mkdir(parents=True)
    fan = Fan(
        [WandBTracker(OPTIONS, folder, name)],
        Record.of(output, folder, "seed: 0", lambda run, now: False),
        told.append,
        patience=120,
    )
    fan.open(Opening("", name, {"train.loss.beta": "0.1"}))
    return fan, told


def test_a_sweep_is_a_group_of_runs_and_one_that_was_killed_goes_on_where_it_was(tmp_path: Path):
    fan, told = begin(tmp_path, "first")
    fan.points("", points(1, 4))
    fan.open(Opening("0000-seed0", "a trial", {}))
    fan.points("0000-seed0", points(1, 2))
    fan.settle()
    fan.close("failed")
    assert not told
    found = {one[0]["job_type"]: one for one in map(held, files_of(tmp_path / "runs" / "first"))}
    run, history, _ = found["run"]
    assert [line["step"] for line in history] == [1, 2, 3, 4]
    assert run["config"]["train.loss.beta"] == "0.1" and run["group"] == "first"
    assert found["trial"][0]["group"] == "first" and found["trial"][0]["id"] != run["id"]
    assert [line["step"] for line in found["trial"][1]] == [1, 2]
    again, told = begin(tmp_path, "second")
    again.points("", points(3, 6))
    again.conclude("", Point(6, 1.0, {"evaluation/accuracy": 0.75}))
    again.close("finished")
    assert not told
    [second] = map(held, files_of(tmp_path / "runs" / "second"))
    assert second[0]["id"] == run["id"] and [line["step"] for line in second[1]] == [5, 6]
    assert second[2]["evaluation/accuracy"] == 0.75


def test_a_whole_run_is_kept_in_its_folder(tmp_path: Path, small_model: Path):
    track = {"tensorboard": False, "wandb": {"project": "cards", "mode": "offline"}}
    job = Job(tmp_path, word_model(tmp_path / "model", small_model), track=track)
    job.write("a.jsonl", number_rows(0, 24))
    assert (done := job.run()).code == 0, done.log
    [folder] = (job.output / "runs").iterdir()
    [file] = files_of(folder)
    run, history, summary = held(file)
    told = summary_of(job.output)["trackers"]["wandb"]
    assert told["failures"] == 0 and told["runs"] == {"": run["id"]}
    assert run["config"]["train.loss.beta"] == "0.1" and run["group"] == folder.name
    assert [(line["step"], line["train/loss"]) for line in history] == [(1, 0.6)]
    assert "evaluation/accuracy" in summary
    kept = {path.name for path in (file.parent / "files").iterdir() if path.is_file() and not path.is_symlink()}
    assert {"config.yaml", "summary.json", "report.html"} <= kept
