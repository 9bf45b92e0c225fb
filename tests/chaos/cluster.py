"""A Ray head and two more nodes, each with processes and a name of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.command_line import LONGEST, processes_below, processes_with
from tests.ray_head import RayHead, ray_head

NODES = ("one", "two")
"""Each holds one worker of the training, and together with the head both of them."""
HERE = str(Path(__file__).parent / "every_process")
SLOW = {"shard": 0.5, "step": 0.15, "publish": 3.0}
"""Seconds by which every shard, every training step and two moments of a publication take longer, disturbed or not: a
fault is to come in their middle."""

DRAINED = 5
"""Seconds from SIGTERM of a node to its end, of which Ray tells those who work on it; half a minute unless told."""


def traced(file: Path, node: str) -> dict[str, str]:
    """What the processes of a node have in their environment, so that their work is noted."""
    path = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"CHAOS_TRACE": str(file), "CHAOS_SLOW": json.dumps(SLOW), "CHAOS_NODE": node, "PYTHONPATH": path}


@dataclass
class Cluster:
    """One that runs."""

    head: RayHead
    trace: Path
    stack: ExitStack
    env: Mapping[str, str]
    """What the nodes beside the head have in their environment besides."""
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    arguments: dict[str, tuple[Sequence[str], Sequence[str]]] = field(default_factory=dict)
    """Of a node: of `ray start`, and the command that it is wrapped in."""

    def heal(self) -> None:
        """Start again the nodes that have gone."""
        for number, name in enumerate(NODES, start=2):
            if name not in self.nodes or self.nodes[name].poll() is not None:
                arguments, wrapped = self.arguments.get(name, ((), ()))
                drained = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAINED)}
                env = {**traced(self.trace, name), **drained, **self.env}
                node = self.head.node(*arguments, wrapped=wrapped, env=env)
                self.nodes[name] = self.stack.enter_context(node)
                # One after the other: two that start at once would take the same name for their sockets.
                self._until(lambda alive, number=number: alive >= number)
        self.await_alive(len(NODES) + 1)

    def await_alive(self, number: int) -> None:
        """Wait until the head knows so many nodes to be alive."""
        self._until(lambda alive: alive == number)

    def _until(self, enough: Callable[[int], bool]) -> None:
        deadline = time.monotonic() + LONGEST
        while not enough(alive := self._alive()):
            assert self.head.process.poll() is None and time.monotonic() < deadline, f"{alive} nodes are alive"
            time.sleep(0.5)

    def _alive(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.head.dashboard}/api/v0/nodes", timeout=60) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
        except OSError:  # a dashboard that has just started, or on a busy machine; it is asked again
            return 0
        return sum(node["state"] == "ALIVE" for node in nodes)

    def raylet(self, name: str) -> int:
        """Process id."""
        below = processes_below(self.nodes[name].pid)
        [pid] = [pid for pid in below if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet"]
        return pid

    def kill_head(self) -> None:
        """SIGKILL of all processes of the head's node, as when its machine is lost; the other nodes are left."""
        root = self.head.process.pid
        for pid in [root, *processes_below(root)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.head.process.wait(60)

    def drivers_of_jobs(self) -> list[int]:
        """Process ids of the commands that submitted jobs run."""
        below = processes_below(self.head.process.pid)
        return [pid for pid, command in below.items() if re.match(r"\S*python\S* \S*/dpo-ray \w+ ", command)]


@contextmanager
def cluster(
    trace: Path,
    *,
    ip: str = "127.0.0.1",
    env: Mapping[str, str] | None = None,
    head_env: Mapping[str, str] | None = None,
    arguments: dict[str, tuple[Sequence[str], Sequence[str]]] | None = None,
) -> Iterator[Cluster]:
    """Start one.

    Args:
        trace: the file of the trace.
        env, head_env: what the nodes have in their environment, and the head.
    """
    head_env = {**traced(trace, "head"), **(head_env or {})}
    with ray_head(num_cpus=2, ip=ip, env=head_env) as head, ExitStack() as stack:
        made = Cluster(head, trace, stack, env or {}, arguments=arguments or {})
        try:
            made.heal()
            yield made
        finally:
            # At once: nodes that end by themselves are drained first, which takes half a minute each.
            for pid in processes_with(f"HOME={head.folder}"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
