"""How a run stands while it is at work, in files that `dpo-ray watch` reads: in an object store too, where nothing is
appended to. In the run's folder:

progress.json    by the driver: stages, what is counted, what it waits for, the last lines; and the driver's process
training.json    by the first training worker: dpo_ray.training.live

Times in them are seconds that have passed, so that no two machines' clocks are compared.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

from dpo_ray.progress import forget, forget_all, last_said, reached, waits_for
from dpo_ray.storage.location import Location
from dpo_ray.storage.process import has_ended, started, this_machine
from dpo_ray.storage.published import who
from dpo_ray.storage.told import EVERY_S, kept_told

PROGRESS = "progress.json"
TRAINING = "training.json"
_NO_SIGN = 2.5
"""Writes that are missing of a run of another machine, after which it is taken to have ended."""


@dataclass
class Live:
    """What a run is at."""

    at: str | None = None
    """Name of the stage; None: before the first."""
    since: float = field(default_factory=time.monotonic)
    trials: Sequence[Sequence[str]] = ()
    """Of a sweep, a table: its head first."""

    def begins(self, stage: str) -> None:
        self.at, self.since = stage, time.monotonic()
        forget()


def told_live(
    live: Live, folder: Location, command: Sequence[str], plan: Sequence[str], ended: Mapping[str, Mapping[str, Any]]
) -> AbstractContextManager[None]:
    """Keep progress.json in a run's folder until the block ends; it stays as it is then.

    Args:
        plan: the stages of the run, as far as they are known before.
        ended: the stages that have ended, as of RunContext.stages, which grows meanwhile.
    """
    forget_all()
    beats = count(1)
    began = time.monotonic()
    pid = os.getpid()
    process = {"by": who(), "pid": pid, "process": started(pid), "machine": this_machine()}

    def content() -> bytes:
        now = time.monotonic()
        stages = {
            name: {"reused": entry["reused"], "seconds": entry["seconds"], "rows": entry["rows"]["kept"]}
            for name, entry in dict(ended).items()
        }
        found: dict[str, Any] = {
            "run_id": folder.name,
            "command": command,
            "plan": plan,
            "seconds": round(now - began, 1),
            "at": live.at and {"stage": live.at, "seconds": round(now - live.since, 1)},
            "stages": stages,
            "counts": [{**asdict(one), "seconds_left": one.seconds_left} for one in reached()],
            "waits_for": waits_for(),
            "said": [asdict(one) for one in last_said()],
            "trials": live.trials,
            "process": process,
            "beat": next(beats),
            "every": EVERY_S,
        }
        return json.dumps(found).encode()  # a path may hold what is no text

    return kept_told(folder / PROGRESS, content, "start")


def at_work(folder: Location, now: float) -> bool:
    """Whether a run that has written no summary since still works: known of a process of this machine; of another's,
    by its last sign.

    Args:
        folder: the run's.
        now: as the store that it lies in has the time.
    """
    written = (folder / PROGRESS).written()
    if written is None:
        return False
    ended = (folder / "summary.json").written()
    if ended is not None and ended >= written:
        return False
    try:
        process = json.loads((folder / PROGRESS).read_bytes())["process"]
    except ValueError:  # damaged: whose it was is not known, and a tracker's run is no reason to end one
        return False
    if process["machine"] is not None and process["machine"] == this_machine():
        return not has_ended(process["machine"], process["pid"], process["process"])
    return now - written < _NO_SIGN * EVERY_S
