"""The setting of the runs, their order, and a run of ours from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed.runs import Setting, settled
from benchmarks.speed.schedule import in_turn


def test_the_rows_run_forwards_and_then_backwards():
    assert in_turn(["a", "b"], 3) == [(1, "a"), (1, "b"), (2, "b"), (2, "a"), (3, "a"), (3, "b")]


def test_a_folder_keeps_its_setting(tmp_path: Path):
    first = settled(tmp_path, {"steps": 3, "threads": 2})
    assert (first.steps, first.pairs_per_step, first.threads) == (3, 4, 2)
    assert settled(tmp_path, {}) == settled(tmp_path, {"steps": 3})
    with pytest.raises(SystemExit, match="steps 3"):
        settled(tmp_path, {"steps": 4})


def test_batch_sizes_must_fill_a_step():
    with pytest.raises(SystemExit, match=r"\[4\] do not divide --pairs-per-step 6"):
        Setting(pairs_per_step=6, trl_batch_sizes=[2, 4, 8])


def test_our_side_runs_and_is_reported(tmp_path: Path, demo_model: str):
    small = ["--random-llama", "64x2", "--threads", "1", "--steps", "2", "--pairs-per-step", "2", "--max-tokens", "200"]
    chosen = ["--data", "generated", "--dtype", "bfloat16", "--rows", "ours", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--folder", str(tmp_path), *small, *chosen],
        cwd=Path(__file__).parents[4], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "## generated, bfloat16" in done.stdout and "\n| ours | " in done.stdout and "Floor: " in done.stdout
