"""The same question to every node of a cluster, by a task on each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from dpo_ray.on_ray.failures import reason_of


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    name: str
    """Host name and address."""
    session: str = ""
    """Its folder of Ray's session: logs, sockets, and what is spilled to disk."""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a node gave back."""

    value: Any
    received: float
    """When it came, by the clock of who asked, in seconds since the epoch."""
    failure: str | None = None
    """Why there is no value, where the function failed, or is not there in the node's installation."""


def alive() -> list[Node]:
    """The nodes of the cluster. Ray must be connected."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [
        Node(
            node["NodeID"],
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            str(PurePath(node["ObjectStoreSocketName"]).parent.parent),
            node["Labels"],
        )
        for node in nodes
    ]


def ask(
    nodes: Sequence[Node], function: Callable[..., Any], arguments: Callable[[Node], tuple[Any, ...]], *, seconds: float
) -> list[Answer | None]:
    """What function(*arguments(node)) gives back on each node; None where none came in time, or the node has gone.

    Args:
        seconds: to wait for all of them.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*arguments(node))
        for node in nodes
    ]
    deadline, waiting, answers = time.monotonic() + seconds, list(asked), {}
    while waiting:
        arrived, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not arrived:
            break
        answers[arrived[0]] = _value(arrived[0])
    for one in waiting:
        ray.cancel(one, force=True)
    return [answers.get(one) for one in asked]


def _value(answered: Any) -> Answer | None:
    import ray

    try:
        return Answer(ray.get(answered), time.time())
    except ray.exceptions.RayTaskError as error:
        return Answer(None, time.time(), reason_of(error))
    except (ray.exceptions.RaySystemError, ray.exceptions.RayError):  # the node has left the cluster
        return None
