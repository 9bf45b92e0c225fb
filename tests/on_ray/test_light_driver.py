"""What the driver of a real run loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import CONFIGS, overrides
from tests.on_ray.test_engine_choice import rows
from tests.unit.test_import_arrows import COMMAND, REPOSITORY


def settings(folder: Path, model: Path) -> list[str]:
    return overrides(
        run__output=str(folder / "out"),
        model__path=str(model),
        data__train=str(folder / "data" / "*.parquet"),
        data__held_out_fraction=0.25,
        reference__calibration_pairs=4,
        train__global_batch_size=8,
        train__num_workers=1,
        train__cpus_per_worker=1,
    )


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
