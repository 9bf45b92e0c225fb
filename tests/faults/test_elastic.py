"""A node is lost in the middle of an elastic training: it goes on with the worker that is left."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.command_line import CONFIGS, DPO_RAY, dpo_ray, overrides, summary_of
from tests.rounding import of_logprob

pytestmark = [pytest.mark.faults, pytest.mark.ray]

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
    on_cluster = {"RAY_ADDRESS": made.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
    process = subprocess.Popen(
        [DPO_RAY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **on_cluster},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if len(nodes) == 2 and re.search(r"checkpoint at step (10|20|30)/", line):
            made.remove_node(nodes.pop(), allow_graceful=False)
    log = "".join(lines)
    assert process.wait(60) == 0, log[-6000:]
    assert len(nodes) == 1, log[-6000:]
    assert "with 1 workers" in log, log[-6000:]
    metrics = metrics_of(tmp_path / "out")
    assert [m["step"] for m in metrics] == list(range(1, NUM_STEPS + 1))

    # The same tokenized pairs.
    shutil.copytree(tmp_path / "out", tmp_path / "alone", ignore=shutil.ignore_patterns("train", "runs"))
    one = overrides(run__output=str(tmp_path / "alone"), train__min_workers=None, train__num_workers=1)
    alone = dpo_ray(*arguments, *one, env=on_cluster)
    assert alone.code == 0, alone.log
    expected = metrics_of(tmp_path / "alone")
    near = 2.0 * of_logprob(49152) / math.sqrt(4)  # β of a pair's mean log-probs, of which the loss is a mean of four
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], abs=near)


def metrics_of(output: Path) -> list[dict]:
    run = output / "runs" / summary_of(output)["run_id"]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
