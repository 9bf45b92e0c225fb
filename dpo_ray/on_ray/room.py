"""Whether a cluster has room for work, and the wait until its autoscaler has made it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dpo_ray.errors import ConfigError
from dpo_ray.progress import say

Nodes = Sequence[Mapping[str, float]]
"""What each node that is alive has, by name."""

_LOOK = 2.0
_TOLD = 30.0
_ALMOST = 1e-6


@dataclass(frozen=True)
class Need:
    """What work needs at once, or would wait for ever: processes, each on one node, and CPUs beside them."""

    why: str
    """The configuration keys that this follows from, for errors."""
    processes: int = 1
    cpus: float = 1
    """Of each process."""
    gpus: float = 0
    """Of each process."""
    beside: float = 0
    """CPUs for what reads and writes, on any nodes."""
    wanted_cpus: float = 0
    """What elastic work could use at once; an embedded Ray is made that large."""

    @property
    def all_cpus(self) -> float:
        return self.processes * self.cpus + self.beside

    @property
    def all_gpus(self) -> float:
        return self.processes * self.gpus

    def bundles(self) -> list[dict[str, float]]:
        """What an autoscaler is to find room for, each on one node."""
        one = {name: number for name, number in (("CPU", self.cpus), ("GPU", self.gpus)) if number}
        return [one] * self.processes + [{"CPU": 1.0}] * math.ceil(self.beside)

    def __str__(self) -> str:
        gpus = f" and {self.all_gpus:g} GPUs" if self.gpus else ""
        return f"{self.all_cpus:g} CPUs{gpus} at once ({self.why})"


def lacking(nodes: Nodes, need: Need) -> str | None:
    """What is missing, in a sentence; None where the work has room."""
    for name, number in (("CPU", need.all_cpus), ("GPU", need.all_gpus)):
        total = sum(node.get(name, 0) for node in nodes)
        if total < number - _ALMOST:
            return f"The Ray cluster has {total:g} {name}s, but this needs {number:g} at once ({need.why})."
    places = sum(_places(node, need) for node in nodes)
    if places >= need.processes:
        return None
    one = " and ".join(f"{n:g} {name}s" for name, n in (("CPU", need.cpus), ("GPU", need.gpus)) if n)
    if places == 0:
        return f"One process of this needs {one} ({need.why}), and no node of the Ray cluster has that many."
    return (
        f"Each of the {need.processes} processes of this needs {one} on one node ({need.why}), and the nodes of the "
        f"Ray cluster have room for {places}."
    )


def _places(node: Mapping[str, float], need: Need) -> int:
    """Processes that a node has room for."""
    asked = [(name, number) for name, number in (("CPU", need.cpus), ("GPU", need.gpus)) if number]
    return min((int(node.get(name, 0) / number + _ALMOST) for name, number in asked), default=need.processes)


def require_room(nodes: Nodes, need: Need) -> None:
    """Raises ConfigError where work would wait for ever."""
    missing = lacking(nodes, need)
    if missing is not None:
        raise ConfigError(f"{missing} Lower those settings, or use a cluster with more or larger nodes.")


@dataclass(frozen=True)
class Cluster:
    """What waiting needs of a cluster, and of time."""

    nodes: Callable[[], Nodes]
    request: Callable[[list[dict[str, float]]], None]
    """Asks the autoscaler for room for bundles, in the place of what was asked for before; [] asks for nothing."""
    now: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep


def await_room(cluster: Cluster, need: Need, minutes: float) -> None:
    """Return when the cluster has room, which its autoscaler is asked to make.

    Ray has one such request for the whole cluster, and no public way to tell what its autoscaler could add, nor whether
    there is one: so where nothing adds nodes, all of the time passes.

    Args:
        minutes: how long to wait at most; 0: not at all.

    Raises ConfigError where there is no room in the end.
    """
    before = cluster.nodes()
    if minutes == 0 or lacking(before, need) is None:
        require_room(before, need)
        return
    began, told = cluster.now(), -math.inf
    try:
        cluster.request(need.bundles())
        while True:
            nodes = cluster.nodes()
            missing, waited = lacking(nodes, need), cluster.now() - began
            if missing is None:
                say("ray", f"there is room after {waited:.0f} s: {described(nodes)}")
                return
            if waited >= 60 * minutes:
                raise ConfigError(
                    f"{missing} After {minutes:g} minutes in which it was asked for more it has {described(nodes)}, "
                    f"where it had {described(before)}. Lower those settings; let the autoscaler add more or larger "
                    "nodes; or wait longer, with run.wait_for_resources."
                )
            if cluster.now() - told >= _TOLD:
                told = cluster.now()
                say(
                    "ray",
                    f"waiting for {need}: there are {described(nodes)}; {waited / 60:.1f} of at most {minutes:g} min "
                    "(run.wait_for_resources; 0 where nothing adds nodes)",
                )
            cluster.pause(_LOOK)
    finally:
        cluster.request([])


def described(nodes: Nodes) -> str:
    """Nodes, CPUs and GPUs in words."""
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    return f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes"
