"""Where a training goes on from: the checkpoints that Ray Train knows of, and those that it lost track of."""

from __future__ import annotations

import json
from typing import Any

from dpo_ray.progress import say
from dpo_ray.storage.location import Location
from dpo_ray.training.files import KIND, STATE, is_whole

_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's record of the checkpoints that it knows


def run_name(runs: Location) -> str:
    """The name under which Ray Train goes on, or begins: the first whose record is whole, and its newest checkpoint.

    Ray does not write that record atomically; a kill in the middle of it would otherwise end every later attempt. And
    it goes on from the newest checkpoint that the record names, whatever has become of that.
    """
    number = 1
    while True:
        name = f"run-{number}"
        record = runs / name / _SNAPSHOT
        if not record.exists():
            return name
        try:
            newest = _newest(record)
        except ValueError:
            say(KIND, f"{record} is damaged; its checkpoints are looked at one by one")
        else:
            if newest is None or is_whole(newest):
                return name
            say(KIND, f"{newest} is damaged or gone; the training goes on from another one")
        number += 1


def _newest(record: Location) -> Location | None:
    """The newest checkpoint in Ray Train's record; None: there is none yet. Raises ValueError where it is damaged."""
    result = json.loads(record.read_bytes())["latest_checkpoint_result"]
    return record.parent / result["checkpoint_dir_name"] if result is not None else None


def leave_out(checkpoint: Location) -> None:
    """Have nothing go on from a damaged checkpoint: from here on it is not whole."""
    (checkpoint / STATE).remove()


def newest_whole_checkpoint(runs: Location) -> Location | None:
    """The checkpoint of the furthest step among those that were written to the end, whatever Ray's record says.

    Not the last one of a training, which could not be gone on from and whose model may be missing.
    """
    found = [c for run in runs.children() for c in whole_checkpoints(run) if not state_of(c)["finished"]]
    return max(found, key=_step_of, default=None)


def resumed_step(run: Location, fallback: Location | None) -> int:
    """The step that workers go on from: that of the newest checkpoint in Ray Train's record, which it gives them.

    Other checkpoints that lie there do not count: the best of an early step, or one that was half uploaded.

    Args:
        fallback: what workers resume from where Ray knows of no checkpoint.
    """
    record = run / _SNAPSHOT
    newest = _newest(record) if record.exists() else None
    if newest is not None:
        return _step_of(newest)
    return _step_of(fallback) if fallback is not None and fallback.exists() else 0


def whole_checkpoints(run: Location) -> list[Location]:
    """The checkpoints of a run that were written to the end, whatever Ray's record says."""
    named = [child for child in run.children() if child.name.startswith("checkpoint_") and child.name != _SNAPSHOT]
    return [child for child in named if is_whole(child)]


def _step_of(checkpoint: Location) -> int:
    return int(state_of(checkpoint)["next_step"])


def state_of(checkpoint: Location) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_bytes())
    return state
