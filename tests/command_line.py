"""Running dpo-ray as a person would: as a process of its own."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

DPO_RAY = str(Path(sys.executable).parent / "dpo-ray")
CONFIGS = Path(__file__).parent.parent / "pipelines" / "configs"
WORKER = "ray::MapWorker(MapBatches(ShardWorker))"
"""How the command line of a shard worker begins."""
LONGEST = 1500.0
"""Seconds after which something hangs; a busy machine is no failure."""
_CPUS = 6
"""Logical, of a Ray that tests share: as many as the largest of them needs."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    log: str

    def lines(self, text: str) -> list[str]:
        """The lines of the log that hold a text."""
        return [line for line in self.log.splitlines() if text in line]


def dpo_ray(*arguments: str, env: dict[str, str] | None = None) -> Finished:
    """Run to the end."""
    done = subprocess.run(
        [DPO_RAY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
        env={**os.environ, **(env or {})},
    )
    return Finished(done.returncode, done.stdout)


class SharedRay:
    """A Ray that tests use one after the other, each in this process.

    Neither it nor the libraries start anew each time: a stage has one worker, and that is a task, whose process has
    loaded them for an earlier one; only vLLM has its actors. What the driver itself does at its start and its end, and
    whole pools, need a run in a process of its own.
    """

    def run(self, *arguments: str, until: str = "") -> Finished:
        """Like dpo_ray; `until` is in_process's."""
        from dpo_ray.on_ray import pool, session

        compute = pool._compute

        def by_tasks(kind: str, location: Any, missing: Any, wanted: pool.Pool, unit: str) -> Any:
            return compute(kind, location, missing, wanted if wanted.env else replace(wanted, stateless=True), unit)

        self._start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session, "disconnect", lambda: None)
            patch.setattr(pool, "num_cores", lambda: 1)
            patch.setattr(pool, "_compute", by_tasks)
            return in_process(*arguments, until=until)

    def stop(self) -> None:
        from dpo_ray.on_ray import session

        session.disconnect()

    @staticmethod
    def _start() -> None:
        import ray

        from dpo_ray.on_ray import session
        from dpo_ray.on_ray.room import Need
        from dpo_ray.progress import WATCHED

        if ray.is_initialized():
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(WATCHED, "5")  # as a run has it when it starts Ray: workers mark their lines
            session.connect(Need("tests", cpus=_CPUS), trains=True)


def in_process(*arguments: str, until: str = "") -> Finished:
    """Run in this process, which has loaded the libraries already.

    Args:
        until: a text to wait for. What workers log comes by way of Ray, and may come after the end.
    """
    from pipelines.cli import main

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setattr(sys, "argv", ["dpo-ray", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        deadline = time.monotonic() + LONGEST
        while until not in said.getvalue() and time.monotonic() < deadline:
            time.sleep(0.2)
    return Finished(int(ended.value.code or 0), said.getvalue())


def overrides(**values: Any) -> list[str]:
    """data__train="x" → -o data.train="x"."""
    return [part for key, value in values.items() for part in ("-o", f"{key.replace('__', '.')}={json.dumps(value)}")]


def killed_at(pattern: str, *arguments: str) -> Finished:
    """Run until a line of the log matches a pattern, then SIGKILL the driver, and it alone."""
    process = subprocess.Popen([DPO_RAY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = _Watch(process, re.compile(pattern))
    watch.thread.start()
    found = watch.seen.wait(LONGEST)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    watch.thread.join(60)
    log = "".join(watch.lines)
    assert found and watch.matched, f"{pattern!r} was not logged before the process ended:\n{log[-4000:]}"
    return Finished(process.returncode, log)


@dataclass
class _Watch:
    process: subprocess.Popen[str]
    pattern: re.Pattern[str]
    matched: bool = False
    lines: list[str] = field(default_factory=list)
    seen: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if self.pattern.search(line):
                self.matched = True
                self.seen.set()
        self.seen.set()


def summary_of(output: Path) -> dict[str, Any]:
    """summary.json of the newest run of an output folder."""
    newest = max((output / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)
    return json.loads((newest / "summary.json").read_text())


def shards_of(output: Path, kind: str, fingerprint: str) -> list[Path]:
    """The shards of a finished artifact of an output folder, in order."""
    from dpo_ray.storage.artifact import open_artifact
    from dpo_ray.storage.location import Location

    return [Path(shard.uri) for shard in open_artifact(Location.of(output / "artifacts" / kind / fingerprint)).shards()]


def processes_with(variable: str) -> dict[int, str]:
    """Process id → command line, of all others that were started with name=value in their environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
        except OSError:  # it has ended
            continue
    return found


def processes_below(root: int) -> dict[int, str]:
    """Process id → command line, of all descendants of a process."""
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split(None, 2) for line in listing.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, *_ in lines}

    def is_below(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == root:
                return True
        return False

    return {int(pid): " ".join(args) for pid, _, *args in lines if is_below(int(pid))}
