"""SIGKILL of one process of a run, and SIGTERM of its driver."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.cells import Cell
from tests.chaos.cluster import Cluster
from tests.chaos.job import NAME, Job

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

Cells = Callable[[str, str], Cell]
STAGES = {"pairs": "ingest", "tokenized": "tokenize", "reference": "reference", "step": "train", "scores": "evaluate"}
"""What is begun and done in the trace → the stage's name."""


@pytest.mark.parametrize("kind", ["pairs", "tokenized", "reference"])
def test_killed_data_worker(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path, kind: str):
    """A worker of a row-wise stage, in the middle of a shard."""
    what = cell("SIGKILL of a data worker", STAGES[kind])
    mine = job(kind)
    run = mine.start(nodes)
    victim = mine.trace.at_work(kind, run)
    what.strikes()
    os.kill(victim.pid, signal.SIGKILL)
    run.require_success()
    what.ends_as(undisturbed, mine, "by itself")


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_train_worker(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path, rank: int):
    what = cell(f"SIGKILL of the train worker of rank {rank}", "train")
    mine = job("train")
    run = mine.start(nodes)
    victim = mine.trace.at_work("step", run, after=14, of=lambda event: event.name.startswith(f"{rank}/"))
    what.strikes()
    os.kill(victim.pid, signal.SIGKILL)
    run.require_success()
    what.ends_as(undisturbed, mine, "by itself")


@pytest.mark.vllm
def test_killed_engine(
    nodes: Cluster, new_job: Callable[..., Job], kept: Path, servable_model: Path, cell: Cells, tmp_path: Path
):
    """vLLM runs in its actor's process, so that no engine outlives it."""
    engine = {"reference__engine": "vllm", "vllm__kv_cache_gib": 1, "vllm__cpus_per_actor": 1}
    options = {"more": engine, "command": "reference", "model": str(servable_model)}
    undisturbed = kept / "undisturbed-vllm"
    if not list(undisturbed.glob("artifacts/calibration/*/manifest.json")):
        shutil.rmtree(undisturbed, ignore_errors=True)
        new_job(undisturbed, **options).start(nodes).require_success()
    what = cell("SIGKILL of a vLLM engine's actor", "reference")
    mine = new_job(tmp_path / "out", **options)
    run = mine.start(nodes)
    victim = mine.trace.at_work("reference", run)
    what.strikes()
    os.kill(victim.pid, signal.SIGKILL)
    run.require_success()
    what.ends_as(undisturbed, mine, "by itself")


@pytest.mark.parametrize("kind", ["tokenized", "step"])
def test_killed_driver(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path, kind: str):
    """The command that a submitted job runs."""
    what = cell("SIGKILL of a job's driver", STAGES[kind])
    mine = job("train" if kind == "step" else kind)
    first = mine.submit(nodes)
    mine.trace.at_work(kind, first, after=14 if kind == "step" else 2)
    [driver] = nodes.drivers_of_jobs()
    what.strikes()
    os.kill(driver, signal.SIGKILL)
    assert first.code() != 0
    mine.submit(nodes).require_success()
    what.ends_as(undisturbed, mine, "submitted again")


def test_terminated_driver(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path):
    """As Kubernetes and Slurm end a pod or a job: SIGTERM, and half a minute later SIGKILL."""
    what = cell("SIGTERM of the driver, with a deadline", "train")
    mine = job("train")
    first = mine.start(nodes)
    mine.trace.at_work("step", first, after=14)
    what.strikes()
    first.process.terminate()
    first.process.wait(30)
    assert first.code() != 0
    mine.start(nodes).require_success()
    what.ends_as(undisturbed, mine, "the same command again")


@pytest.mark.parametrize("moment", ["copy", "move"])
def test_killed_publish(nodes: Cluster, job: Callable[..., Job], cell: Cells, undisturbed: Path, moment: str):
    """While the model's files are copied, and between the record of the pointer's move and the move."""
    what = cell("SIGKILL of the driver", {"copy": "publish: files", "move": "publish: pointer"}[moment])
    mine = job(None)
    first = mine.start(nodes)
    mine.trace.wait_for("publish", moment, "begun", first)
    what.strikes()
    first.kill()
    mine.start(nodes).require_success()
    what.ends_as(undisturbed, mine, "the same command again")
    folder = Path(mine.output.uri) / "models" / NAME
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]
