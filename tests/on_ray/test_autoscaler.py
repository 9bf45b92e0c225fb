"""A cluster whose autoscaler stands at zero: a run asks for nodes, waits for them, and is done."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import CONFIGS, LONGEST, dpo_ray, overrides
from tests.on_ray.test_main_job import preference_rows
from tests.ray_head import RayHead, ray_head

pytestmark = pytest.mark.ray

TYPES = {
    "small": {"resources": {"CPU": 2, "object_store_memory": 10**8}, "min_workers": 0, "max_workers": 1},
    "large": {"resources": {"CPU": 2, "GPU": 1, "object_store_memory": 10**8}, "min_workers": 0, "max_workers": 1},
}


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(num_cpus=0, autoscaling=TYPES) as head:
        yield head


def test_a_run_on_a_cluster_without_nodes_waits_for_them(head: RayHead, tmp_path: Path, write_preferences):
    write_preferences(tmp_path / "data", preference_rows(0, 12))
    settings = {
        "run__output": str(tmp_path / "out"),
        "model__path": "none",
        "data__train": str(tmp_path / "data"),
    }
    command = ["ingest", str(CONFIGS / "align_cpu.yaml")]
    refused = dpo_ray(*command, *overrides(**settings, run__wait_for_resources=0), env=head.env)
    assert refused.code == 2, refused.log
    assert "ingest: The Ray cluster has 0 CPUs, but this needs 2 at once" in refused.log
    done = dpo_ray(*command, *overrides(**settings), env=head.env)
    assert done.code == 0, done.log
    assert "[ray] waiting for 2 CPUs at once" in done.log and "there are 0 CPUs and 0 GPUs on 1 nodes" in done.log
    assert "[ray] there is room after" in done.log
    assert done.lines("[ingest] done: 12 rows")


@pytest.mark.long
def test_a_gpu_is_asked_for_and_more_than_can_come_is_refused_after_the_time(head: RayHead):
    script = """
    import ray
    from dpo_ray.errors import ConfigError
    from dpo_ray.on_ray.room import Need
    from dpo_ray.on_ray.session import connect, wait_at_most

    wait_at_most(20)
    connect(Need("this test", gpus=1))
    print("did", ray.get(ray.remote(num_gpus=1)(lambda: 7).remote()))
    wait_at_most(0.2)
    try:
        connect(Need("this test", processes=2, gpus=1))
    except ConfigError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **head.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
    )
    assert done.returncode == 0, done.stdout
    assert "[ray] waiting for 1 CPUs and 1 GPUs at once" in done.stdout and "did 7" in done.stdout
    assert "has 1 GPUs, but this needs 2 at once (this test). After 0.2 minutes" in done.stdout
