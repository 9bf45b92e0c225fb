"""An embedded Ray is as large as the work that it is connected for."""

from __future__ import annotations

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.on_ray.session import connect, disconnect, num_cores

pytestmark = pytest.mark.ray


def test_an_embedded_ray_is_started_again_for_work_that_needs_more_cpus_and_never_grows_gpus(monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    more = num_cores() + 3
    try:
        connect(1, why="a small stage")
        first = ray.cluster_resources()["CPU"]
        assert num_cores() < first < more
        session = ray.get_runtime_context().get_node_id()
        connect(first, why="a stage that fits")
        assert ray.get_runtime_context().get_node_id() == session
        connect(more, why="train.num_workers")
        assert ray.cluster_resources()["CPU"] == more
        with pytest.raises(ConfigError, match=r"GPUs.*train\.use_gpu"):
            connect(1, 64, why="train.use_gpu")
    finally:
        disconnect()
