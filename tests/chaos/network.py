"""A network namespace for a node, beside the machine's own, and a bridge between them that can be taken away."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest

INTERFACE = "chaos0"
"""By which each side reaches the other: the bridge outside, the end of the cable inside."""
_NAMESPACE, _OUTER, _INNER = "chaos-node", "chaos-outer", "chaos-inner"


@dataclass(frozen=True)
class Network:
    """One that stands."""

    outside: str
    """Address of this machine, as the namespace sees it."""
    inside: str
    """Address of the namespace."""

    @property
    def enter(self) -> Sequence[str]:
        """What a command is wrapped in to run inside."""
        return ("ip", "netns", "exec", _NAMESPACE)

    def cut(self) -> None:
        """From now on packets are lost both ways; neither side is told."""
        _ip("link", "set", _OUTER, "nomaster")

    def mend(self) -> None:
        _ip("link", "set", _OUTER, "master", INTERFACE)


@contextmanager
def cut_off_node() -> Iterator[Network]:
    """Make both, and take them away at the end. Skips a test of a user who may not."""
    try:
        _ip("netns", "add", _NAMESPACE)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user may not make a network namespace (ip netns add, as root): {error}")
    try:
        _ip("link", "add", INTERFACE, "type", "bridge")
        _ip("link", "add", _OUTER, "type", "veth", "peer", "name", _INNER, "netns", _NAMESPACE)
        _ip("-n", _NAMESPACE, "link", "set", _INNER, "name", INTERFACE)
        _ip("link", "set", _OUTER, "master", INTERFACE)
        _ip("addr", "add", "10.213.7.1/24", "dev", INTERFACE)
        for name in (_OUTER, INTERFACE):
            _ip("link", "set", name, "up")
        for words in (["addr", "add", "10.213.7.2/24", "dev", INTERFACE], ["link", "set", INTERFACE, "up"]):
            _ip("-n", _NAMESPACE, *words)
        _ip("-n", _NAMESPACE, "link", "set", "lo", "up")
        _ip("-n", _NAMESPACE, "route", "add", "default", "via", "10.213.7.1")
        yield Network("10.213.7.1", "10.213.7.2")
    finally:
        for words in (["link", "del", INTERFACE], ["link", "del", _OUTER], ["netns", "del", _NAMESPACE]):
            with suppress(subprocess.CalledProcessError):  # what was not made yet
                _ip(*words)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=60)
