"""Whether all nodes of a cluster see the folder that a run writes to: a token is written here and read there."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo_ray.errors import ConfigError
from dpo_ray.on_ray.ask_nodes import Node, alive, ask
from dpo_ray.progress import say
from dpo_ray.storage.location import Location

_SECONDS_TO_ANSWER = 120
_SECONDS_TO_APPEAR = 5  # a network file system may show a file late


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
    nodes = alive() if nodes is None else nodes
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


def _read_on(nodes: Sequence[Node], file: Path) -> list[str | None]:
    answers = ask(nodes, read_token, lambda node: (str(file),), seconds=_SECONDS_TO_ANSWER)
    return [answer.value if answer is not None else None for answer in answers]


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
