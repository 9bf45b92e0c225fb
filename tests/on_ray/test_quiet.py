"""A real run: what a person sees of it, and what its driver loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.terminal import LOG
from tests.command_line import CONFIGS, dpo_ray, overrides
from tests.on_ray.test_engine_choice import rows
from tests.unit.test_import_arrows import COMMAND, REPOSITORY

NOISE = [
    "Triton",
    "NUMA",
    "constructor arguments in the object store",
    "Loading safetensors",
    "Progress bars disabled",
    "Execution plan of Dataset",
    "Token authentication",
    "Warning",
    "pid=",
]


def settings(folder: Path, model: Path) -> list[str]:
    return overrides(
        run__output=str(folder / "out"),
        model__path=str(model),
        data__train=str(folder / "data" / "*.parquet"),
        data__held_out_fraction=0.25,
        reference__calibration_pairs=4,
        train__global_batch_size=8,
        train__num_workers=1,
    )


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_run_says_its_own_lines_and_the_rest_to_its_log(tmp_path, servable_model, write_preferences):
    write_preferences(tmp_path / "data", rows(0))
    done = dpo_ray("train", str(CONFIGS / "align_cpu.yaml"), *settings(tmp_path, servable_model))
    assert done.code == 0, done.log
    during, _, closing = done.log.partition("\n\n")
    assert all(re.match(r"\[[a-z_]+\] ", line) for line in during.splitlines()), during
    assert not [noise for noise in NOISE if noise in done.log]
    [log] = (tmp_path / "out" / "runs").glob(f"*/{LOG}")
    assert f"Log:     {log}" in closing
    text = log.read_text()
    assert all(line in text for line in during.splitlines())
    assert "(RayTrainWorker pid=" in text and "Progress bars disabled" in text
    assert not set(text) & {"\x1e", "\x1f"}


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_driver_loads_nothing_that_only_its_workers_compute_with(tmp_path, tiny_model, write_preferences):
    write_preferences(tmp_path / "data", rows(0))
    command = [sys.executable, "-c", COMMAND, "tokenize", str(CONFIGS / "align_cpu.yaml")]
    done = subprocess.run(
        [*command, *settings(tmp_path, tiny_model)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    _, code, *loaded = done.stdout.splitlines()[-1].split()
    assert code == "0", done.stderr
    assert "ray" in loaded and not set(loaded) & {"torch", "transformers", "vllm"}
