"""An embedded Ray is as large as the work that it is connected for."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.on_ray import session
from dpo_ray.on_ray.room import Need
from dpo_ray.on_ray.session import connect, disconnect, num_cores
from tests.ray_head import ray_head

AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


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
    with pytest.raises(ConfigError, match=rf"RAY_ADDRESS is {listening}, and what .* unset RAY_ADDRESS"):
        connect(Need("this test"))


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_at_which_nobody_listens_is_named_at_once(no_ray, monkeypatch, form: str):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = form.format(f"127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("RAY_ADDRESS", free)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS is {free}, and no Ray cluster answers there .*refused"):
        connect(Need("this test"))


@pytest.mark.ray
def test_an_embedded_ray_is_started_again_for_work_that_needs_more_cpus(no_ray, monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    more = num_cores() + 3
    try:
        connect(Need("a small stage"))
        first = ray.cluster_resources()["CPU"]
        assert num_cores() < first < more
        node = ray.get_runtime_context().get_node_id()
        connect(Need("a stage that fits", cpus=first))
        assert ray.get_runtime_context().get_node_id() == node
        connect(Need("train.num_workers", cpus=more))
        assert ray.cluster_resources()["CPU"] == more
        with pytest.raises(ConfigError, match=r"GPUs.*train\.use_gpu"):
            connect(Need("train.use_gpu", gpus=64))
    finally:
        disconnect()


@pytest.mark.ray
def test_an_embedded_ray_asks_for_a_token_and_leaves_none_in_the_users_home(tmp_path: Path):
    program = """
import os, ray
from dpo_ray.on_ray.room import Need
from dpo_ray.on_ray.session import connect, disconnect
for _ in range(2):
    connect(Need("a small stage"))
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    disconnect()
ray.init(address="local", num_cpus=1, include_dashboard=False)  # another's, in the same process
"""
    environment = {k: v for k, v in os.environ.items() if k not in {"RAY_ADDRESS", *AUTHENTICATION}}
    environment["HOME"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".ray" / "auth_token").exists()


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """The address of a Ray that demands a token."""
    with ray_head(token="a" * 64) as head:
        yield head.address


@pytest.mark.ray
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "here RAY_AUTH_MODE is not set, and no token is found"),
        ({"RAY_AUTH_MODE": "token"}, "here RAY_AUTH_MODE is token, and no token is found"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}, "here .* token, and a token is in RAY_AUTH_TOKEN"),
    ],
    ids=["nothing", "no token", "another token"],
)
def test_a_cluster_that_wants_another_token_is_named(guarded: str, tmp_path: Path, given: dict[str, str], told: str):
    program = "from dpo_ray.on_ray.session import join; join()"
    environment = {name: value for name, value in os.environ.items() if name not in AUTHENTICATION}
    environment |= {"RAY_ADDRESS": guarded, "HOME": str(tmp_path), **given}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.search(rf"ConfigError: RAY_ADDRESS is {guarded}, and what listens .* let us in .*{told}", last)
    assert "b" * 64 not in done.stderr


@pytest.mark.ray
def test_work_that_trains_finds_the_state_api_also_where_an_earlier_stage_did_without(no_ray, monkeypatch):
    import ray
    from ray.util.state import list_nodes

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "_session", session._Session())
    try:
        connect(Need("a stage that carries rows"))
        first = ray.get_runtime_context().get_node_id()
        assert not session._session.has_dashboard
        connect(Need("train.num_workers"), trains=True)
        second, address = ray.get_runtime_context().get_node_id(), ray.get_runtime_context().gcs_address
        assert second != first and [node.node_id for node in list_nodes(address=address)] == [second]
        connect(Need("the stage after it"))
        assert ray.get_runtime_context().get_node_id() == second
    finally:
        disconnect()
