"""An embedded Ray is as large as the work that it is connected for."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.on_ray import session
from dpo_ray.on_ray.session import connect, disconnect, num_cores, require_room


def test_a_process_must_have_room_on_one_node():
    nodes = [{"CPU": 8.0, "memory": 1e9}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]
    wanted = {"CPU": 24, "GPU": 4}
    require_room(nodes, wanted, {"CPU": 8, "GPU": 2}, "vllm.gpus_per_actor")
    with pytest.raises(ConfigError, match=r"needs 1 CPUs and 4 GPUs \(vllm\.gpus_per_actor\), and no node"):
        require_room(nodes, wanted, {"CPU": 1, "GPU": 4}, "vllm.gpus_per_actor")
    with pytest.raises(ConfigError, match=r"no node .* larger nodes"):
        require_room(nodes, wanted, {"CPU": 16, "GPU": 0}, "train.cpus_per_worker")
    with pytest.raises(ConfigError, match=r"has 24 CPUs, but this needs 25 at once"):
        require_room(nodes, {"CPU": 25, "GPU": 0}, {"CPU": 1, "GPU": 0}, "train.num_workers")


@pytest.fixture
def listening() -> Iterator[str]:
    """An address where somebody listens who is no Ray."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_at_which_no_ray_answers_is_named(monkeypatch, listening: str):
    import ray

    def refuse(**options: object) -> None:
        raise ConnectionError("Failed to connect")

    monkeypatch.setenv("RAY_ADDRESS", listening)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConfigError, match=rf"RAY_ADDRESS is {listening}, and no .* unset RAY_ADDRESS"):
        connect(1, why="this test")


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_at_which_nobody_listens_is_named_at_once(no_ray, monkeypatch, form: str):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = form.format(f"127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("RAY_ADDRESS", free)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS is {free}, and no Ray cluster answers there .*refused"):
        connect(1, why="this test")


@pytest.mark.ray
def test_an_embedded_ray_is_started_again_for_work_that_needs_more_cpus(no_ray, monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    more = num_cores() + 3
    try:
        connect(1, why="a small stage")
        first = ray.cluster_resources()["CPU"]
        assert num_cores() < first < more
        node = ray.get_runtime_context().get_node_id()
        connect(first, why="a stage that fits")
        assert ray.get_runtime_context().get_node_id() == node
        connect(more, why="train.num_workers")
        assert ray.cluster_resources()["CPU"] == more
        with pytest.raises(ConfigError, match=r"GPUs.*train\.use_gpu"):
            connect(1, 64, why="train.use_gpu")
    finally:
        disconnect()


@pytest.mark.ray
def test_work_that_trains_finds_the_state_api_also_where_an_earlier_stage_did_without(no_ray, monkeypatch):
    import ray
    from ray.util.state import list_nodes

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "_session", session._Session())
    try:
        connect(1, why="a stage that carries rows")
        first = ray.get_runtime_context().get_node_id()
        assert not session._session.has_dashboard
        connect(1, why="train.num_workers", trains=True)
        second, address = ray.get_runtime_context().get_node_id(), ray.get_runtime_context().gcs_address
        assert second != first and [node.node_id for node in list_nodes(address=address)] == [second]
        connect(1, why="the stage after it")
        assert ray.get_runtime_context().get_node_id() == second
    finally:
        disconnect()
