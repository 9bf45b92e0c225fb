"""The examples in docs/examples really run, as scripts and as notebooks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import LONGEST
from tests.notebooks import EXAMPLES

pytestmark = [pytest.mark.ray, pytest.mark.long]

KERNEL = """
import asyncio, json, sys

async def kernel():  # as in a notebook: the main thread, and a loop that runs
    names = {"__name__": "__main__"}
    for cell in json.load(open(sys.argv[1]))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)

sys.path.insert(0, "")  # as a kernel has it, which is begun in the notebook's folder
asyncio.run(kernel())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the examples, to run in."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "examples"))


def run(folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(EXAMPLES.parents[1])
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def as_script(folder: Path, name: str) -> str:
    return run(folder, f"{name}.py")


def as_notebook(folder: Path, name: str) -> str:
    return run(folder, "-c", KERNEL, f"{name}.ipynb")


@pytest.mark.vllm
@pytest.mark.parametrize("how", [as_script, as_notebook])
def test_a_reward_of_ones_own(folder: Path, how):
    said = how(folder, "own_reward")
    pairs = next(line for line in said.splitlines() if line.startswith("pairs:"))
    assert int(pairs.split()[1]) > 0
    [reward] = [line for line in said.splitlines() if line.startswith("loss of the first step:")]
    assert float(reward.rpartition(" ")[2]) == pytest.approx(0.6931, abs=1e-3)
    assert "held-out accuracy: Estimate(value=" in said
    [trained, *_] = [json.loads(f.read_text()) for f in folder.glob("out/own_reward/runs/runs/*/summary.json")]
    assert trained["exit_code"] == 0


@pytest.mark.parametrize("how", [as_script, as_notebook])
def test_a_sweep(folder: Path, how):
    said = how(folder, "sweep")
    assert "best: {" in said and "beta of the best:" in said
    assert "published: " in said and list(folder.glob("out/sweep/runs/models/polite/latest.json"))


def test_on_a_ray_that_the_process_has_and_keeps(tmp_path: Path, small_model: Path):
    """Twice, and the process's own Ray is there afterwards."""
    from tests.whole_run import Job, number_rows, word_model

    job = Job(tmp_path, word_model(tmp_path / "model", small_model))
    job.write("one.jsonl", number_rows(0, 40))
    program = f"""
import ray
ray.init(address="local", num_cpus=3, include_dashboard=True)
from dpo_ray import api
config = api.load_config({str(job.path)!r}, {{"train.num_workers": 1, "train.cpus_per_worker": 1}})
first, second = api.evaluate(config), api.evaluate(config)
assert not first.stages["train"].reused and second.stages["train"].reused
assert ray.is_initialized() and ray.get(ray.remote(lambda: 1).remote()) == 1
print("kept")
"""
    assert run(tmp_path, "-c", program).endswith("kept\n")
