"""Whether a cluster has room for work, and the wait until its autoscaler has made it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dpo_ray.config import NodeChoice
from dpo_ray.config.placement import ACCELERATOR, ANYWHERE, is_custom
from dpo_ray.errors import ConfigError
from dpo_ray.progress import say, waiting


@dataclass(frozen=True)
class Host:
    """A node that is alive."""

    resources: Mapping[str, float]
    """What it has, by Ray's names."""
    labels: Mapping[str, str] = field(default_factory=dict)


Nodes = Sequence[Host]

_LOOK = 2.0
_TOLD = 30.0
_ALMOST = 1e-6
_LISTED = 8
_ID = "ray.io/node-id"  # a label that Ray gives to every node
_LARGER = "Lower those settings, or use a cluster with more or larger nodes."
_COUNTED = ("CPU", "GPU")


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
    place: NodeChoice = ANYWHERE
    """Nodes of the processes."""

    @property
    def all_cpus(self) -> float:
        return self.processes * self.cpus + self.beside

    @property
    def all_gpus(self) -> float:
        return self.processes * self.gpus

    @property
    def each(self) -> dict[str, float]:
        """What each process takes of its node."""
        return {name: n for name, n in (("CPU", self.cpus), ("GPU", self.gpus)) if n} | self.place.taken

    def bundles(self) -> list[dict[str, float]]:
        """What an autoscaler is to find room for, each on one node."""
        return [self.each] * self.processes + [{"CPU": 1.0}] * math.ceil(self.beside)

    def label_selectors(self) -> list[dict[str, str]]:
        """Of the nodes of each bundle; empty where none has any."""
        if not self.place.label_selector:
            return []
        return [self.place.label_selector] * self.processes + [{}] * math.ceil(self.beside)

    def __str__(self) -> str:
        gpus = f" and {self.all_gpus:g} GPUs" if self.gpus else ""
        where = f" on nodes with {self.place}" if self.place.options else ""
        return f"{self.all_cpus:g} CPUs{gpus} at once{where} ({self.why})"


@dataclass(frozen=True)
class Lack:
    """What work misses."""

    said: str
    """In a sentence."""
    way_out: str = _LARGER
    """Where nothing adds nodes."""
    of_nodes: bool = False
    """There is no node of the kind; and not: they are too few or too small."""

    def __str__(self) -> str:
        return self.said


def lacking(nodes: Nodes, need: Need) -> Lack | None:
    """What is missing; None where the work has room."""
    if need.place.options and (lack := _no_such_node(nodes, need.place)) is not None:
        return lack
    for name, number in zip(_COUNTED, (need.all_cpus, need.all_gpus), strict=True):
        total = _total(nodes, name)
        if total < number - _ALMOST:
            return Lack(f"The Ray cluster has {total:g} {name}s, but this needs {number:g} at once ({need.why}).")
    nodes = fitting(nodes, need.place)
    for name, each in zip(_COUNTED, (need.cpus, need.gpus), strict=True):
        total, number = _total(nodes, name), need.processes * each
        if total < number - _ALMOST:
            return Lack(
                f"The nodes with {need.place} ({need.place.key}) have {total:g} {name}s, but this needs {number:g} at "
                f"once ({need.why})."
            )
    places = sum(_places(node, need) for node in nodes)
    if places >= need.processes:
        return None
    one = " and ".join(_quantity(name, number) for name, number in need.each.items())
    which = f"with {need.place} ({need.place.key})" if need.place.options else "of the Ray cluster"
    if places == 0:
        return Lack(f"One process of this needs {one} ({need.why}), and no node {which} has that many.")
    return Lack(
        f"Each of the {need.processes} processes of this needs {one} on one node ({need.why}), and the nodes {which} "
        f"have room for {places}."
    )


def fitting(nodes: Nodes, place: NodeChoice) -> Nodes:
    """The nodes that a process may be put on, whether or not it has room there."""
    return [n for n in nodes if place.admits(n.labels) and all(n.resources.get(name, 0) for name in place.taken)]


def _no_such_node(nodes: Nodes, place: NodeChoice) -> Lack | None:
    """What no node has: the labels; or a custom resource, or the accelerator, together with these."""
    labelled = [node for node in nodes if place.admits(node.labels)]
    if not labelled:
        return Lack(
            f"No node of the Ray cluster has the labels that {place.key}.label_selector asks for ({place.selected}): "
            f"there are {_listed(map(_labels, nodes))}.",
            "Start nodes with these labels (`ray start --labels`; on Kubernetes, `labels` of the worker group), or "
            f"change {place.key}.label_selector.",
            of_nodes=True,
        )
    if fitting(nodes, place):
        return None
    with_labels = f" with {place.selected}" if place.label_selector else ""
    accelerator = place.accelerator_type
    if accelerator and not any(f"{ACCELERATOR}{accelerator}" in node.resources for node in labelled):
        return Lack(
            f"{place.key}.accelerator_type is {accelerator}, and no node{with_labels} has one: there are "
            f"{_listed(map(_accelerators, labelled))}.",
            f"Use a cluster that has it, or change {place.key}.accelerator_type.",
            of_nodes=True,
        )
    return Lack(
        f"{place.key}.resources asks each process for {_and(place.resources)}, and no node{with_labels} has that: "
        f"there are {_listed(map(_custom, labelled))}.",
        f"Start nodes with it (`ray start --resources`), or change {place.key}.resources.",
        of_nodes=True,
    )


def _and(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{number:g} {name}" for name, number in resources.items())


def _labels(node: Host) -> str:
    own = [f"{key}={value}" for key, value in sorted(node.labels.items()) if key != _ID]
    return " and ".join(own) or "no labels"


def _accelerators(node: Host) -> str:
    types = [name.removeprefix(ACCELERATOR) for name in node.resources if name.startswith(ACCELERATOR)]
    return " and ".join(sorted(types)) or "no accelerator"


def _custom(node: Host) -> str:
    return _and({name: number for name, number in node.resources.items() if is_custom(name)}) or "none"


def _listed(kinds: Iterable[str]) -> str:
    """Nodes in words, those that are alike counted."""
    counted = Counter(kinds).most_common()
    said = [f"{count} with {kind}" for kind, count in counted[:_LISTED]]
    more = sum(count for _, count in counted[_LISTED:])
    return ", ".join(said + [f"{more} others"] * bool(more)) or "no nodes"


def _total(nodes: Nodes, name: str) -> float:
    return sum(node.resources.get(name, 0) for node in nodes)


def _quantity(name: str, number: float) -> str:
    if name.startswith(ACCELERATOR):
        return f"the accelerator {name.removeprefix(ACCELERATOR)}"
    return f"{number:g} {name}{'s' if name in _COUNTED else ''}"


def _places(node: Host, need: Need) -> int:
    """Processes that a node has room for."""
    room = [int(node.resources.get(name, 0) / number + _ALMOST) for name, number in need.each.items()]
    return min(room, default=need.processes)


def require_room(nodes: Nodes, need: Need) -> None:
    """Raises ConfigError where work would wait for ever."""
    lack = lacking(nodes, need)
    if lack is not None:
        raise ConfigError(f"{lack.said} {lack.way_out}")


@dataclass(frozen=True)
class Cluster:
    """What waiting needs of a cluster, and of time."""

    nodes: Callable[[], Nodes]
    request: Callable[[list[dict[str, float]], list[dict[str, str]]], None]
    """Asks the autoscaler for room for bundles on nodes with labels (Need.bundles, Need.label_selectors), in the place
    of what was asked for before; without bundles, for nothing."""
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
        while True:
            nodes = cluster.nodes()
            lack, waited = lacking(nodes, need), cluster.now() - began
            if lack is None:
                say("ray", f"there is room after {waited:.0f} s: {described(nodes)}")
                return
            if waited >= 60 * minutes:
                raise ConfigError(
                    f"{lack.said} After {minutes:g} minutes in which it was asked for more it has {described(nodes)}, "
                    f"where it had {described(before)}. {_way_out_of_waiting(lack)}"
                )
            if cluster.now() - told >= _TOLD:
                told = cluster.now()
                # Anew each time, for another run that waited and came to its room has taken all requests back.
                cluster.request(need.bundles(), need.label_selectors())
                say(
                    "ray",
                    f"waiting for {need}: there are {described(nodes)}; {waited / 60:.1f} of at most {minutes:g} min "
                    "(run.wait_for_resources; 0 where nothing adds nodes)",
                )
            with waiting(f"for {need}: there are {described(nodes)}"):
                cluster.pause(_LOOK)
    finally:
        cluster.request([], [])


def _way_out_of_waiting(lack: Lack) -> str:
    if lack.of_nodes:
        return f"{lack.way_out} Where the autoscaler can add such nodes, wait longer, with run.wait_for_resources."
    return (
        "Lower those settings; let the autoscaler add more or larger nodes; or wait longer, with "
        "run.wait_for_resources."
    )


def described(nodes: Nodes) -> str:
    """Nodes, CPUs and GPUs in words."""
    return f"{_total(nodes, 'CPU'):g} CPUs and {_total(nodes, 'GPU'):g} GPUs on {len(nodes)} nodes"
