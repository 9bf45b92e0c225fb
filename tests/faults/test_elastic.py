"""A node is lost in the middle of an elastic training: it goes on with the worker that is left."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from dpo_ray.config import load_config
from dpo_ray.on_ray.stream import read_share
from dpo_ray.storage.artifact import load
from dpo_ray.storage.location import Location
from dpo_ray.training.batch import Step
from dpo_ray.training.files import MODEL_FOLDER
from dpo_ray.training.loop import train
from dpo_ray.training.parallel import Rank
from dpo_ray.training.plan import make_plan
from tests.command_line import CONFIGS, DPO_RAY, overrides, summary_of
from tests.rounding import of_logprob
from tests.training import Kept, Trained

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.long]

NUM_STEPS = 100
"""So many that none of them is the last before the lost node is noticed."""


@pytest.fixture
def cluster():
    """A head that is too small for a worker, and two nodes that hold one each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made, [made.add_node(num_cpus=2) for _ in range(2)]
    made.shutdown()


def test_training_goes_on_with_fewer_workers(cluster, tiny_model, write_preferences, tmp_path):
    made, nodes = cluster
    write_preferences(
        tmp_path / "data",
        [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No {n} today."} for n in range(40)],
    )
    settings = {
        "run__output": str(tmp_path / "out"),
        "model__path": str(tiny_model),
        "data__train": str(tmp_path / "data"),
        "data__held_out_fraction": 0.0,
        "train__loss": {"type": "simpo"},
        "train__global_batch_size": 4,
        "train__epochs": NUM_STEPS // 10,
        "train__learning_rate": 1e-4,
        "train__checkpoint_every_steps": 10,
        "train__min_workers": 1,
        "train__cpus_per_worker": 2,
        "train__tokens_per_microbatch": 1024,
    }
    arguments = ["train", str(CONFIGS / "align_cpu.yaml"), *overrides(**settings)]
    # Seconds that Ray Train waits for workers on the lost node.
    waiting = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
    process = subprocess.Popen(
        [DPO_RAY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **waiting, "RAY_ADDRESS": made.address},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        # Not at the first: that one may not be safe yet.
        if len(nodes) == 2 and re.search(r"checkpoint at step (20|30|40)/", line):
            made.remove_node(nodes.pop(), allow_graceful=False)
    log = "".join(lines)
    assert process.wait(60) == 0, log[-6000:]
    assert len(nodes) == 1, log[-6000:]
    assert "with 1 workers" in log, log[-6000:]
    metrics = metrics_of(tmp_path / "out")
    assert [m["step"] for m in metrics] == list(range(1, NUM_STEPS + 1))

    expected = alone(arguments[1:], tmp_path)
    near = 2.0 * of_logprob(49152) / math.sqrt(4)  # β of a pair's mean log-probs, of which the loss is a mean of four
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], abs=near)


def alone(arguments: list[str], folder: Path) -> list[dict]:
    """The metrics of the same training by one worker, in this process and without Ray."""
    path, *settings = arguments
    config = load_config(path, settings[1::2])
    [manifest] = (folder / "out" / "artifacts" / "tokenized").glob("*/manifest.json")
    rows = load(Location.of(manifest.parent), "tokenized", manifest.parent.name)
    assert rows is not None
    plan, _ = make_plan(Location.of(folder / "out"), config, rows)
    shares = {n: read_share(plan.index, step, 0, 1, 1024, plan.hidden_size) for n, step in plan.steps()}
    train(
        config.model,
        config.train,
        seed=config.run.seed,
        num_steps=plan.num_steps,
        pairs_per_epoch=len(plan.index),
        me=Rank(0, 1, torch.device("cpu")),
        steps_from=lambda start: [Step(n, share) for n, share in shares.items() if n >= start],
        held_out=None,
        checkpoints=Kept(folder / "alone"),
        export_to=Location.of(folder / "alone" / MODEL_FOLDER),
        resume=None,
        require_reference=None,
    )
    return Trained(folder / "alone").metrics


def metrics_of(output: Path) -> list[dict]:
    run = output / "runs" / summary_of(output)["run_id"]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
