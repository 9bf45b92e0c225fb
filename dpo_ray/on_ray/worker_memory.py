"""How much memory a training worker has: of all nodes that may hold one, the node with the least decides."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.config import NodeChoice, Train
from dpo_ray.errors import DpoRayError
from dpo_ray.on_ray.failures import raise_ours, reason_of
from dpo_ray.on_ray.room import Host, fitting
from dpo_ray.progress import say
from dpo_ray.training.files import KIND

MOST_NODES = 64
"""Nodes that are asked, at most: of a larger cluster some of each kind."""

_PATIENCE = 60  # seconds for a node whose GPUs others hold, once another one has answered
_GIB = 2**30

Node = Mapping[str, Any]
"""As ray.nodes() tells of it."""


def least_memory(options: Train, place: NodeChoice) -> int:
    """Bytes that a training worker has on the node that has the least for one. Ray must be connected.

    Raises DpoRayError where no node answers.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    holding = may_hold_a_worker(ray.nodes(), options, place)
    asked = some_of_each_kind(holding, MOST_NODES)
    task = ray.remote(num_cpus=0, num_gpus=options.gpus, max_calls=1)(_worker_memory)
    refs = {}
    for node in asked:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ref = task.options(scheduling_strategy=here).remote(workers_beside(node, options), options.gpus)
        refs[ref] = node_name(node)
    answered, busy = [], list(refs)
    if busy:
        ray.wait(busy, num_returns=1)
        answered, busy = ray.wait(busy, num_returns=len(busy), timeout=_PATIENCE)
    for ref in busy:
        ray.cancel(ref)
    found: dict[str, int] = {}
    failure: Exception | None = None
    for ref in answered:
        try:
            found[refs[ref]] = ray.get(ref)
        except Exception as error:  # the node may have gone since
            failure = error
            say(KIND, f"node {refs[ref]} was not asked for its memory: {reason_of(error)}")
    if not found:
        if failure is not None:
            raise_ours(failure, KIND)
        raise DpoRayError(
            f"None of {len(asked)} nodes told how much memory a training worker has there. Set "
            "train.tokens_per_microbatch to a number, or look whether the cluster's nodes are up (ray status)."
        )
    for line in what_was_found(found, [refs[ref] for ref in busy], len(asked), len(holding)):
        say(KIND, line)
    return min(found.values())


def may_hold_a_worker(nodes: Sequence[Node], options: Train, place: NodeChoice) -> list[Node]:
    """Those that are alive, of the kind that was chosen, and large enough for one."""
    return [
        node
        for node in nodes
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= options.cpus_per_worker
        and node["Resources"].get("GPU", 0) >= options.gpus
        and fitting([Host(node["Resources"], node["Labels"])], place)
    ]


def some_of_each_kind(nodes: Sequence[Node], most: int) -> list[Node]:
    """At most so many nodes: in turn one of each kind, as accelerator, numbers of CPUs and GPUs, and memory tell it."""
    kinds: dict[Any, list[Node]] = {}
    for node in sorted(nodes, key=lambda node: str(node["NodeID"])):
        kinds.setdefault(_kind(node["Resources"]), []).append(node)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*kinds.values()))
    return [node for node in in_turn if node is not None][:most]


def _kind(resources: Mapping[str, float]) -> tuple[Any, ...]:
    accelerators = sorted(name for name in resources if name.startswith("accelerator_type:"))
    # Machines that are alike differ by a little in what Ray leaves of their memory.
    memory = round(resources.get("memory", 0) / _GIB)
    return (*accelerators, resources.get("CPU", 0), resources.get("GPU", 0), memory)


def workers_beside(node: Node, options: Train) -> int:
    """Workers of a training that share a node's memory, at most."""
    return max(1, min(options.num_workers, int(node["Resources"].get("CPU", 0) // options.cpus_per_worker)))


def node_name(node: Node) -> str:
    """Short, and another one for each node, also where several are on one machine."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def what_was_found(found: Mapping[str, int], busy: Sequence[str], asked: int, holding: int) -> list[str]:
    """Lines for who watches, where not every node has the same, or not every one was asked.

    Args:
        found: node → bytes of a worker there.
        busy: nodes that did not answer.
        asked, holding: numbers of nodes.
    """
    lines = []
    least, most = min(found.values()), max(found.values())
    if round(least / _GIB, 1) < round(most / _GIB, 1):
        smallest = min(found, key=lambda name: (found[name], name))
        lines.append(
            f"a worker has {least / _GIB:.1f} GiB on node {smallest}, and up to {most / _GIB:.1f} GiB on others: the "
            "least counts, for a worker may be put on any of them"
        )
    if holding > asked:
        lines.append(
            f"{asked} of the {holding} nodes that may hold a worker were asked for their memory, of each kind some"
        )
    if busy:
        lines.append(
            f"{len(busy)} nodes did not tell their memory within {_PATIENCE} s, for others hold their GPUs; the first: "
            f"{busy[0]}"
        )
    return lines


def _worker_memory(beside: int, gpus: float) -> int:
    from dpo_ray.training.memory import worker_memory  # with torch, in the process that is asked

    return worker_memory(beside, gpus)
