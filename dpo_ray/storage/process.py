"""A process as records name it: which one it is among all of its machine, and whether it still runs."""

from __future__ import annotations

import os
from pathlib import Path


def this_machine() -> str | None:
    """This boot of this kernel and this namespace of process ids; None where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def started(pid: int) -> str | None:
    """When a process of this machine was started, in clock ticks since the boot; None where there is none that runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *others = stat.rpartition(")")[2].split()
    return None if state in "ZX" else others[18]


def has_ended(machine: str | None, pid: int, process: str | None) -> bool:
    """Whether a process is known to have ended: of another machine nothing is known.

    machine, process: what `this_machine` and `started` have said of it.
    """
    return machine is not None and machine == this_machine() and process != started(pid)
