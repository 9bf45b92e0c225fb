"""SIGKILL of a worker and of the driver in the middle of training, again and again: the result is bit-identical.

DPO_RAY_KILLS is how often (2 unless told), DPO_RAY_KILL_SEED draws the moments.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import CONFIGS, DPO_RAY, overrides, processes_below, summary_of

KILLS = tuple(("worker", "driver")[n % 2] for n in range(int(os.environ.get("DPO_RAY_KILLS", "2"))))
EPOCHS = 2 + len(KILLS)
NUM_STEPS = 10 * EPOCHS

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(1800 + 300 * len(KILLS))]


@pytest.fixture(scope="module")
def job(one_ray, tmp_path_factory, tiny_model, write_preferences):
    """A function output → arguments of a training of NUM_STEPS steps on pairs that are scored already, and the weights
    that come of it uninterrupted."""
    folder = tmp_path_factory.mktemp("killed_training")
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No {n} today."} for n in range(40)]
    write_preferences(folder / "data", rows)
    settings = {
        "model__path": str(tiny_model),
        "data__train": str(folder / "data"),
        "data__held_out_fraction": 0.0,
        "reference__engine": "torch",
        "reference__calibration_pairs": 4,
        "train__global_batch_size": 4,
        "train__epochs": EPOCHS,
        "train__learning_rate": 1e-3,
        "train__checkpoint_every_steps": 3,
        "train__max_failures": len(KILLS),
        "train__tokens_per_microbatch": 1024,
    }
    config = str(CONFIGS / "align_cpu.yaml")
    scored, whole = folder / "scored", folder / "whole"

    def arguments(output: Path) -> list[str]:
        shutil.copytree(scored, output)
        return ["train", config, *overrides(**settings, run__output=str(output))]

    done = one_ray("reference", config, *overrides(**settings, run__output=str(scored)))
    assert done.code == 0, done.log
    done = one_ray(*arguments(whole))
    assert done.code == 0, done.log
    return arguments, weights(whole)


def weights(output: Path) -> dict[str, torch.Tensor]:
    [policy] = (output / "artifacts" / "train").iterdir()
    return load_file(policy / "model" / "model.safetensors")


def test_killed_at_random_steps_the_weights_are_the_same_bit_for_bit(job, tmp_path):
    command, uninterrupted = job
    chance = random.Random(os.environ.get("DPO_RAY_KILL_SEED", "kills"))
    arguments = command(tmp_path / "out")
    points = sorted(chance.sample(range(7, NUM_STEPS - 6), len(KILLS)))
    kills = list(zip(points, KILLS, strict=True))
    log = ""
    resumed = 0
    while True:
        killed, text = run_until_killed(arguments, kills, chance)
        log += text
        resumed += text.count("going on from checkpoint")
        if not killed:
            break
    assert not kills, f"the run ended before {kills}:\n{log[-3000:]}"
    summary = summary_of(tmp_path / "out")
    assert summary["exit_code"] == 0
    assert resumed == len(KILLS), log[-6000:]
    got = weights(tmp_path / "out")
    assert got.keys() == uninterrupted.keys()
    differing = [name for name in got if not torch.equal(got[name], uninterrupted[name])]
    assert not differing
    metrics = (tmp_path / "out" / "runs" / summary["run_id"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, NUM_STEPS + 1))


def run_until_killed(arguments: list[str], kills: list[tuple[int, str]], chance: random.Random) -> tuple[bool, str]:
    """Run the command; kill as is due. Returns whether the driver was killed, and the log."""
    process = subprocess.Popen([DPO_RAY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        found = re.search(r"checkpoint at step (\d+)/", line)
        if not (found and kills and int(found[1]) >= kills[0][0]):
            continue
        time.sleep(chance.uniform(0, 1))
        _, victim = kills.pop(0)
        if victim == "driver":
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            return True, "".join(lines)
        workers = [pid for pid, name in processes_below(process.pid).items() if name.startswith("ray::RayTrainWorker")]
        os.kill(max(workers), signal.SIGKILL)
    code = process.wait(60)
    assert code == 0, "".join(lines)[-6000:]
    return False, "".join(lines)
