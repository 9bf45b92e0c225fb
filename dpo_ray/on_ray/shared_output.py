"""Whether all nodes of a cluster see the folder that a run writes to: a token is written here and read there."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_ray.errors import ConfigError
from dpo_ray.progress import say
from dpo_ray.storage.location import Location

_SECONDS_TO_ANSWER = 120
_SECONDS_TO_APPEAR = 5  # a network file system may show a file late


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    name: str
    """Host name and address."""


Read = Callable[[Sequence[Node], Path], list[str | None]]
"""Gives what each node reads at a path: the text, "" where there is no such file, None where no node answered."""


def require_seen_by_all(output: Location, nodes: Sequence[Node] | None = None, read: Read | None = None) -> None:
    """Raises ConfigError where run.output is a local folder that a node which is there now does not see. Ray must be
    connected. Nodes that join later are not asked.

    Args:
        nodes, read: of the cluster, left out: those that Ray knows, asked by tasks.
    """
    if not output.is_local:
        return
    nodes = _alive() if nodes is None else nodes
    token = uuid.uuid4().hex
    file = output / f".seen-{token[:8]}"
    file.write_bytes(token.encode())
    try:
        answers = (read or _read_on)(nodes, Path(file.uri))
    finally:
        file.remove()
    silent = [node.name for node, answer in zip(nodes, answers, strict=True) if answer is None]
    blind = [node.name for node, answer in zip(nodes, answers, strict=True) if answer not in {None, token}]
    if blind:
        raise ConfigError(
            f"run.output is {output}, a local folder, and of the {len(nodes)} nodes of the Ray cluster "
            f"{len(blind)} {'does' if len(blind) == 1 else 'do'} not see what is written there: {', '.join(blind)}. "
            "What their workers write would be missing. Name a bucket, as in s3://bucket/folder, or a folder that is "
            "mounted on all nodes."
        )
    if silent:
        say("start", f"whether {output} is seen on {', '.join(silent)} could not be found out: no answer from there")
    if len(nodes) > 1 or silent:
        say("start", f"{output} is seen by {len(nodes) - len(silent)} nodes; those that join later have to see it too")


def _alive() -> list[Node]:
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})") for node in alive]


def _read_on(nodes: Sequence[Node], file: Path) -> list[str | None]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(read_token)
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(str(file))
        for node in nodes
    ]
    ray.wait(asked, num_returns=len(asked), timeout=_SECONDS_TO_ANSWER)
    return [_answer(one) for one in asked]


def _answer(asked: Any) -> str | None:
    import ray

    try:
        answer: str = ray.get(asked, timeout=0)
    except (ray.exceptions.RaySystemError, ray.exceptions.RayError):  # it has left the cluster, or is slow to answer
        ray.cancel(asked, force=True)
        return None
    return answer


def read_token(file: str) -> str:
    """Its text; "" where it does not appear within seconds, or may not be read."""
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while True:
        try:
            return Path(file).read_text()
        except OSError:
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.5)
