"""Two runs that come to the same training: one trains, the others leave, wait, and go on when it is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

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


def test_one_trains_and_the_others_leave_or_wait_and_go_on_when_it_is_killed(tmp_path, tiny_model, write_preferences):
    write_preferences(tmp_path / "data", preference_rows(0, 24))
    settings = overrides(
        run__output=str(tmp_path / "out"),
        model__path=str(tiny_model),
        data__train=str(tmp_path / "data"),
        data__held_out_fraction=0.0,
        train__loss={"type": "simpo"},
        train__num_workers=1,
        train__global_batch_size=4,
        train__epochs=40,
        train__checkpoint_every_steps=5,
        train__tokens_per_microbatch=1024,
    )
    command = ["train", str(CONFIGS / "align_cpu.yaml"), *settings]

    def start(run_id: str) -> subprocess.Popen[str]:
        command_line = [DPO_RAY, *command, "--run-id", run_id]
        return subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = start("first")
    until(first, r"\[train\].*/240 steps")
    left = dpo_ray(*command, "-o", "run.when_busy=leave")
    assert left.code == 75, left.log
    assert left.lines("Busy: The training") and left.lines("is the work of run first by")
    second = start("second")
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
