"""A spot node is taken away: with its warning nothing is lost that was trained before, without it all since the last
checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_ray.config import load_config
from dpo_ray.on_ray.stream import read_share
from dpo_ray.progress import WATCHED
from dpo_ray.storage.artifact import load
from dpo_ray.storage.location import Location
from dpo_ray.training.batch import Step
from dpo_ray.training.files import MODEL_FOLDER
from dpo_ray.training.loop import train
from dpo_ray.training.parallel import Rank
from dpo_ray.training.plan import make_plan
from tests.command_line import CONFIGS, DPO_RAY, overrides, processes_below
from tests.faults.test_killed_training import weights
from tests.training import Kept, Trained

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.long]

NUM_STEPS = 160
"""So many that none of them is the last before the node's time is up."""
SECONDS = 6
"""From the warning to the deadline."""


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that is too small for the worker, and two nodes that hold one."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made, [made.add_node(num_cpus=2) for _ in range(2)]
    made.shutdown()


@pytest.fixture
def arguments(tiny_model: Path, write_preferences: Any, tmp_path: Path) -> list[str]:
    """Of a training whose only checkpoint is the last one."""
    rows = [
        {"prompt": f"Say {n}. " * 8, "chosen": f"It is {n}. " * 12, "rejected": f"No {n} today. " * 12}
        for n in range(32)
    ]
    write_preferences(tmp_path / "data", rows)
    settings = {
        "run__output": str(tmp_path / "out"),
        "model__path": str(tiny_model),
        "data__train": str(tmp_path / "data"),
        "data__held_out_fraction": 0.0,
        "train__loss": {"type": "simpo"},
        "train__global_batch_size": 8,
        "train__epochs": NUM_STEPS // 4,
        "train__learning_rate": 1e-4,
        "train__checkpoint_every_steps": NUM_STEPS,
        "train__num_workers": 1,
        "train__cpus_per_worker": 1.5,
        "train__max_failures": 1,
        "train__tokens_per_microbatch": 1024,
    }
    return [str(CONFIGS / "align_cpu.yaml"), *overrides(**settings)]


def of_worker(nodes: list[Any]) -> Any:
    """The node that the training's worker is on."""
    for node in nodes:
        [raylet] = node.all_processes["raylet"]
        if any(name.startswith("ray::RayTrainWorker") for name in processes_below(raylet.process.pid).values()):
            return node
    raise AssertionError("no node has a worker")


def drain(node: Any, address: str) -> None:
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command = ["drain-node", "--address", address, "--node-id", node.node_id, *reason]
    command += ["--deadline-remaining-seconds", str(SECONDS)]
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *command], check=True, capture_output=True, timeout=120
    )


def start(arguments: list[str], address: str) -> subprocess.Popen[str]:
    """The training, which tells its step several times a second."""
    # This process may have started an embedded Ray before, whose trainings are not warned.
    inherited = {name: value for name, value in os.environ.items() if "PREEMPTION" not in name}
    return subprocess.Popen(
        [DPO_RAY, "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, WATCHED: "0.2", "RAY_ADDRESS": address},
    )


def step_of(line: str) -> int | None:
    found = re.search(rf"\[train\] (\d+)/{NUM_STEPS} steps", line)
    return int(found[1]) if found else None


def test_with_a_warning_what_was_trained_before_is_kept(cluster: Any, arguments: list[str], tmp_path: Path):
    made, nodes = cluster
    process = start(arguments, made.address)
    assert process.stdout is not None
    lines: list[str] = []
    reached = warned_at = resumed_at = last = 0
    for line in process.stdout:
        lines.append(line)
        reached = max(reached, step_of(line) or 0)
        if reached and not warned_at:
            drain(of_worker(nodes), made.address)
            warned_at = reached
        if found := re.search(r"going on from checkpoint.*after step (\d+), with 1 workers", line):
            resumed_at, last = int(found[1]), reached
    log = "".join(lines)
    assert process.wait(60) == 0, log[-6000:]
    assert re.search(r"node \w{8} with rank 0 will be taken away in \d+ s", log), log[-6000:]
    kept = [int(step) for step in re.findall(rf"checkpoint at step (\d+)/{NUM_STEPS}", log)]
    print(f"\nwarned after step {warned_at}; kept {kept}; it had reached {last}, and went on after {resumed_at}")
    assert warned_at <= kept[0] <= resumed_at < NUM_STEPS
    assert resumed_at == max(step for step in kept if step < NUM_STEPS)
    got, expected = weights(tmp_path / "out"), alone(arguments, tmp_path).weights
    assert got.keys() == expected.keys()
    assert not [name for name in got if not torch.equal(got[name], expected[name])]


def test_without_one_all_since_the_last_checkpoint_is_lost(cluster: Any, arguments: list[str]):
    made, nodes = cluster
    process = start(arguments, made.address)
    assert process.stdout is not None
    lines, steps = [], [0]
    killed_at = 0
    for line in process.stdout:
        lines.append(line)
        steps += [step] if (step := step_of(line)) is not None else []
        if steps[-1] >= 40 and not killed_at:
            made.remove_node(of_worker(nodes), allow_graceful=False)
            killed_at = steps[-1]
        if killed_at and steps[-1] < killed_at:
            break
    process.kill()
    assert killed_at and steps[-1] < killed_at, "".join(lines)[-6000:]
    print(f"\nkilled after step {killed_at} and begun anew: {killed_at} steps are lost")
    assert "going on from" not in "".join(lines)


def alone(arguments: list[str], folder: Path) -> Trained:
    """The same training by one worker, in this process and without Ray."""
    path, *settings = arguments
    config = load_config(path, settings[1::2])
    [manifest] = (folder / "out" / "artifacts" / "tokenized").glob("*/manifest.json")
    rows = load(Location.of(manifest.parent), "tokenized", manifest.parent.name)
    assert rows is not None
    plan, _ = make_plan(Location.of(folder / "out"), config, rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(
            config.model,
            config.train,
            seed=config.run.seed,
            num_steps=plan.num_steps,
            pairs_per_epoch=len(plan.index),
            me=Rank(0, 1, torch.device("cpu")),
            steps_from=lambda _: (
                Step(n, read_share(plan.index, rows, 0, 1, 1024, plan.hidden_size)) for n, rows in plan.steps()
            ),
            held_out=None,
            checkpoints=Kept(folder / "alone"),
            export_to=Location.of(folder / "alone" / MODEL_FOLDER),
            resume=None,
            require_reference=None,
        )
    finally:
        torch.set_num_threads(threads)
    return Trained(folder / "alone")
