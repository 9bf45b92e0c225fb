"""Two runs that come to the same training: one trains, the others leave, wait, and go on when it is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from dpo_ray.storage.conditional import conditional_file
from dpo_ray.storage.location import Location
from tests.command_line import CONFIGS, DPO_RAY, LONGEST, dpo_ray, overrides, summary_of
from tests.on_ray.test_main_job import preference_rows

pytestmark = [pytest.mark.ray, pytest.mark.faults]


def until(process: subprocess.Popen[str], pattern: str) -> str:
    """What a run says up to the line that a pattern matches."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(f"{pattern!r} was not said:\n{said[-4000:]}")


@pytest.fixture
def command(tmp_path: Path, tiny_model: Path, write_preferences) -> list[str]:
    """Of a training of 240 steps."""
    write_preferences(tmp_path / "data", preference_rows(0, 24))
    settings = overrides(
        run__output=str(tmp_path / "out"),
        model__path=str(tiny_model),
        data__train=str(tmp_path / "data"),
        data__held_out_fraction=0.0,
        train__loss={"type": "simpo"},
        train__num_workers=1,
        train__cpus_per_worker=1,
        train__global_batch_size=4,
        train__epochs=40,
        train__checkpoint_every_steps=5,
        train__tokens_per_microbatch=1024,
    )
    return ["train", str(CONFIGS / "align_cpu.yaml"), *settings]


def start(command: list[str], run_id: str) -> subprocess.Popen[str]:
    arguments = [DPO_RAY, *command, "--run-id", run_id]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
def test_one_trains_and_the_others_leave_or_wait_and_go_on_when_it_is_killed(command: list[str], tmp_path: Path):
    first = start(command, "first")
    until(first, r"\[train\].*/240 steps")
    left = dpo_ray(*command, "-o", "run.when_busy=leave")
    assert left.code == 75, left.log
    assert left.lines("Busy: The training") and left.lines("is the work of run first by")
    second = start(command, "second")
    until(second, r"the work of run first by .*: waiting until it has ended")
    os.kill(first.pid, signal.SIGKILL)
    first.wait(LONGEST)
    said, _ = second.communicate(timeout=LONGEST)
    assert second.returncode == 0, said
    assert "is taken over from run first" in said and "whose process has ended" in said
    again = dpo_ray(*command)
    assert again.code == 0 and again.lines("[train] reused"), again.log
    assert summary_of(tmp_path / "out")["stages"]["train"]["reused"]
    [lease] = (tmp_path / "out" / "leases").glob("train-*.json")
    assert json.loads(Path(lease).read_text())["held"] is False


def test_a_run_whose_training_was_taken_over_stops_and_publishes_nothing(command: list[str], tmp_path: Path):
    run = start(command, "stalled")
    until(run, r"\[train\].*/240 steps")
    [file] = (tmp_path / "out" / "leases").glob("train-*.json")
    held = conditional_file(Location.of(file))
    other = {"holder": "other", "run_id": "nightly-2", "by": "ann@far", "machine": "far"}
    while True:
        seen = held.read()
        assert seen is not None
        if held.swap(seen, json.dumps({**json.loads(seen.content), **other}).encode()):
            break
    said, _ = run.communicate(timeout=LONGEST)
    assert run.returncode == 1, said
    assert "LeaseLost: The training" in said and "by run nightly-2 by ann@far" in said
    assert not list((tmp_path / "out" / "artifacts" / "train").glob("*/manifest.json"))
    assert summary_of(tmp_path / "out")["exit_code"] == 1
    assert json.loads(file.read_text())["run_id"] == "nightly-2"
