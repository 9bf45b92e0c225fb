"""Nodes that are about to be taken away, as spot instances are: what was trained is kept before they go.

Ray Train watches for nodes that are drained, and tells the workers. When the node's time is up it starts the workers
anew on those that are left, and does not count that as a failure (train.max_failures).
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from dpo_ray.progress import say
from dpo_ray.training.files import KIND

if TYPE_CHECKING:
    from ray.train import PreemptionInfo

    from dpo_ray.training.parallel import Rank

_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_POLL = "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"
_INTERVAL = 1.0  # seconds between two looks; a warning comes half a minute before, or two
_NOTHING, _LOOK, _KEEP = 0, 1, 2


def watch_for_preemption(embedded: bool) -> None:
    """Have the trainings that this process starts be warned; on an embedded Ray, whose only node stays as long as the
    training does, not: the watcher is a process for each of them."""
    os.environ.setdefault(_WATCHER, "0" if embedded else "1")
    os.environ.setdefault(_POLL, f"{_INTERVAL:g}")


def preemption_is_watched() -> bool:
    """Whether a worker of a training is told."""
    return os.environ.get(_WATCHER, "1") != "0"


class Forewarning:
    """When a checkpoint is due because nodes of this training are about to go: at once, and just before they do.

    Between the two the training goes on, for nobody else can use the time: where the warning names a deadline, what
    the workers do after it is lost.
    """

    def __init__(self, me: Rank) -> None:
        self.me = me
        self._looked = time.monotonic()
        self._known: set[str] = set()
        self._deadline: float | None = None
        self._kept_at: float | None = None
        self._takes: float | None = None

    def is_due(self) -> bool:
        """Every rank calls it after each step, and is told the same."""
        if self._kept_at is not None:
            self._measure(time.monotonic() - self._kept_at)
        agreed = self._agreed()
        due = agreed == _KEEP or (agreed == _LOOK and self._is_new())
        self._kept_at = time.monotonic() if due else None
        return due

    def _measure(self, seconds: float) -> None:
        """How long a checkpoint took, and the step after it."""
        self._takes = seconds
        if self._is_close():
            self._deadline = None  # another one would keep no more than this one did

    def _is_close(self) -> bool:
        if self._deadline is None or self._takes is None:
            return False
        return self._deadline - time.time() <= 2 * self._takes + _INTERVAL

    def _agreed(self) -> int:
        """What rank 0 finds that is to be done: clocks differ, and every rank must do the same."""
        import torch

        from dpo_ray.training.parallel import summed

        wanted = self._wanted() if self.me.rank == 0 else _NOTHING
        return int(summed(torch.tensor([wanted], device=self.me.device), self.me))

    def _wanted(self) -> int:
        if self._is_close():
            self._deadline = None
            return _KEEP
        if time.monotonic() - self._looked < _INTERVAL:
            return _NOTHING
        self._looked = time.monotonic()
        return _LOOK

    def _is_new(self) -> bool:
        import ray.train

        info = ray.train.get_preemption_info()
        if info is None or self._known.issuperset(info.preempted_node_ids):
            return False
        self._known.update(info.preempted_node_ids)
        self._deadline = info.deadline_ms / 1000 if info.deadline_ms else None
        if self.me.rank == 0:
            say(KIND, _told(info, time.time()))
        return True


def _told(info: PreemptionInfo, now: float) -> str:
    nodes = ", ".join(node[:8] for node in info.preempted_node_ids)
    ranks = ", ".join(map(str, info.preempted_ranks))
    when = f"in {max(0.0, info.deadline_ms / 1000 - now):.0f} s" if info.deadline_ms else "soon"
    return f"node {nodes} with rank {ranks} will be taken away {when}: a checkpoint is kept before"
