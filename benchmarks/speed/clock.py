"""The time that a piece of work takes, on which device, and what else runs on the machine."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


class Clock:
    """Wall seconds and CPU seconds of the process, all its threads together; a GPU's work is waited for."""

    def __init__(self) -> None:
        import torch

        self._wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        self._began = (0.0, 0.0)

    def start(self) -> None:
        self._wait()
        self._began = (time.perf_counter(), time.process_time())

    def stop(self) -> dict[str, float]:
        """Since the start."""
        self._wait()
        return {"wall": time.perf_counter() - self._began[0], "cpu": time.process_time() - self._began[1]}


def busy_cores(before: str, after: str) -> float:
    """Cores in use between two readings of /proc/stat."""
    num_cores = sum(line.startswith("cpu") and line[3].isdigit() for line in after.splitlines())
    first, second = ([int(x) for x in text.split("\n", 1)[0].split()[1:9]] for text in (before, after))
    passed = [b - a for a, b in zip(first, second, strict=True)]
    idle = passed[3] + passed[4]  # idle, and idle while waiting for a disk
    return num_cores * (1 - idle / sum(passed)) if sum(passed) else 0.0


def machine_load() -> dict[str, Any]:
    """What else runs on the machine: the load average, which knows the run before this one too, and this second."""
    stat = Path("/proc/stat")
    busy = None
    if stat.is_file():
        before = stat.read_text()
        time.sleep(1)
        busy = busy_cores(before, stat.read_text())
    return {"average": os.getloadavg()[0], "busy_cores": busy}


def device() -> str:
    """Where this process computes: "cuda" where it sees a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
