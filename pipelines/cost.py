"""What a run cost: the hours that its stages took, times the workers and GPUs that they had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_ray.config import Train

_HOUR = 3600.0


def cost_of(stages: Mapping[str, Mapping[str, Any]], seconds: float, sweep: tuple[float, int, Train] | None) -> Any:
    """`hours` from the run's start to its end; and over its stages `worker_hours` and `gpu_hours`.

    Workers are counted as asked for, for as long as their stage took: a pool that grew only in its course, or waited
    for room, cost less.

    Args:
        stages: as summary.json has them.
        seconds: of the run.
        sweep: of the trials the seconds, how many were at work at once, and what each asks for.
    """
    work = [(entry["seconds"], entry["workers"], entry["gpus"]) for entry in stages.values()]
    if sweep is not None:
        took, at_once, train = sweep
        work.append((took, at_once * train.num_workers, at_once * train.num_workers * train.gpus))
    return {
        "hours": round(seconds / _HOUR, 4),
        "worker_hours": round(sum(took * workers for took, workers, _ in work) / _HOUR, 4),
        "gpu_hours": round(sum(took * gpus for took, _, gpus in work) / _HOUR, 4),
    }
