"""A Ray head of the tests' own on loopback, and nodes that join it, each a process that is ended at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.command_line import LONGEST, processes_with

RAY = str(Path(sys.executable).parent / "ray")
_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
    "runtime-env-agent-port",
)


@dataclass(frozen=True)
class RayHead:
    """Where it answers."""

    dashboard: str
    """As in http://127.0.0.1:8265."""
    address: str
    """What RAY_ADDRESS is to be."""
    folder: str
    token: str | None
    process: subprocess.Popen[bytes]
    """`ray start --block`, above all other processes of its node."""

    @property
    def env(self) -> dict[str, str]:
        """Of a process that joins it."""
        return {**_authentication(self.token), "RAY_ADDRESS": self.address}

    @contextmanager
    def node(
        self, *arguments: str, wrapped: Sequence[str] = (), env: Mapping[str, str] | None = None, num_cpus: int = 2
    ) -> Iterator[subprocess.Popen[bytes]]:
        """One more node: `ray start --block`, above all other processes of it.

        Args:
            wrapped: a command that is given Ray's as its further arguments.
            env: what its processes have in their environment besides.
        """
        ports = [f"--{name}={port}" for name, port in zip(_PORTS, free_ports(len(_PORTS)), strict=True)]
        # As on a machine of its own: nodes that share a folder remove a job's working directory below each other.
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        start = [RAY, "start", f"--address={self.address}", f"--num-cpus={num_cpus}", f"--temp-dir={folder}"]
        command = [*wrapped, *start, *_COMMON, *ports, *arguments]
        try:
            with _running(command, self.folder, {**self.env, **(env or {})}) as process:
                yield process
        finally:
            shutil.rmtree(folder, ignore_errors=True)


_COMMON = ("--object-store-memory=200000000", "--disable-usage-stats", "--block")


@contextmanager
def ray_head(
    num_cpus: int = 4,
    autoscaling: dict[str, Any] | None = None,
    token: str | None = None,
    ip: str = "127.0.0.1",
    env: Mapping[str, str] | None = None,
) -> Iterator[RayHead]:
    """Start one.

    Args:
        autoscaling: types of the nodes that Ray's autoscaler may add on this machine, by name.
        token: what it demands of all who join it.
        ip: of this machine, where its nodes find it.
        env: what its processes have in their environment besides.
    """
    gcs, dashboard, client, *others = free_ports(3 + len(_PORTS))
    # Unix sockets lie below it, and their paths have to be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    arguments = [f"--{name}={port}" for name, port in zip(_PORTS, others, strict=True)]
    env = {**_authentication(token), **(env or {})}
    if autoscaling is not None:
        file = Path(folder) / "autoscaling.json"
        file.write_text(json.dumps(_fake_multinode(f"{ip}:{gcs}", autoscaling)))
        arguments.append(f"--autoscaling-config={file}")
        env |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    command = [
        RAY,
        "start",
        "--head",
        f"--node-ip-address={ip}",
        f"--dashboard-host={ip}",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
        f"--num-cpus={num_cpus}",
        f"--temp-dir={folder}",
        *_COMMON,
        *arguments,
    ]
    try:
        with _running(command, folder, env) as process:
            head = RayHead(f"http://{ip}:{dashboard}", f"{ip}:{gcs}", folder, token, process)
            _wait_for(head, process, agent=(ip, others[0]))
            yield head
    finally:
        for pid in processes_with(f"HOME={folder}"):  # nodes that an autoscaler made outlive it
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _authentication(token: str | None) -> dict[str, str]:
    if token is None:
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _fake_multinode(gcs: str, types: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` would be given for nodes that are processes of one machine."""
    head = {"ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0}}
    return {
        "cluster_name": "fake",
        "max_workers": 8,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs,
            "use_node_id_as_ip": True,  # they share the machine's
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {**{name: {"node_config": {}, **one} for name, one in types.items()}, **head},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 20.0,
        "idle_timeout_minutes": 5,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


@contextmanager
def _running(command: list[str], folder: str, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "HOME": folder, **env}
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _wait_for(head: RayHead, process: subprocess.Popen[bytes], agent: tuple[str, int]) -> None:
    """Until its dashboard answers, and its node's agent, by which jobs are started."""
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/")
    if head.token is not None:
        request.add_header("Authorization", f"Bearer {head.token}")
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        assert process.poll() is None, "the Ray head ended at its start"
        try:
            with urllib.request.urlopen(request, timeout=60), socket.create_connection(agent, timeout=60):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no dashboard at {head.dashboard}, or no agent at {agent}, within {LONGEST:g} seconds")
