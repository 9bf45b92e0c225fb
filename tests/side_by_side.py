"""What keeps processes of pytest apart: each has a home of its own, and ends what its tests left behind."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.command_line import processes_below, processes_with

OWNER = "DPO_RAY_TESTS"
"""In the environment of whatever a process of pytest starts: the home that it was given."""


@contextmanager
def own_home() -> Iterator[Path]:
    """A home and a folder for Ray that no other process of pytest has; at the end nothing that was started is left.

    Caches stay the user's, for they are made for sharing: models that were converted, fonts that were listed.
    """
    # Sockets of Ray lie below it, and their paths have to be short.
    home = Path(tempfile.mkdtemp(prefix="dpo-", dir="/tmp"))
    cache = Path("~/.cache").expanduser()
    before = dict(os.environ)
    os.environ.setdefault("XDG_CACHE_HOME", str(cache))
    # Ray keeps its session and, below the home, its token; two that start at once would each write one.
    os.environ |= {"HOME": str(home), "RAY_TMPDIR": str(home), OWNER: str(home)}
    try:
        yield home
    finally:
        _end(f"{OWNER}={home}")
        os.environ.clear()
        os.environ |= before
        shutil.rmtree(home, ignore_errors=True)


def _end(mark: str) -> None:
    """Kill what outlived its test. The workers of a run that has just ended need some seconds by themselves."""
    deadline = time.monotonic() + 30
    while (left := _orphans(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left:
        warnings.warn(f"processes outlived the tests that started them: {left}", stacklevel=2)


def _orphans(mark: str) -> dict[int, str]:
    mine = processes_below(os.getpid())
    return {pid: command for pid, command in processes_with(mark).items() if pid not in mine}
