"""How a training stands, in a few kilobytes: its step, its speed, and curves of as many points as a terminal shows."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MOST_POINTS = 256
METRICS = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
"""Name in metrics.jsonl → name for people."""
_HELD_OUT = "eval_"


class Points:
    """A curve of at most MOST_POINTS points: when there are more, each two are made one, their mean."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._stride, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._stride:
            return
        self.values.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.values) == MOST_POINTS:
            pairs = zip(self.values[::2], self.values[1::2], strict=True)
            self.values = [(a + b) / 2 for a, b in pairs]
            self._stride *= 2


class TrainingSoFar:
    """Called with the metrics of each step; `content` is what there is to read of it.

    Args:
        history: lines of metrics.jsonl of the steps before.
        memory: bytes of the GPU that this worker has taken, and that there are; None: there is no GPU.
    """

    def __init__(
        self,
        num_steps: int,
        num_workers: int,
        history: Iterable[Mapping[str, Any]] = (),
        memory: Callable[[], tuple[int, int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_steps, self._num_workers, self._memory, self._clock = num_steps, num_workers, memory, clock
        self._lock = threading.Lock()
        self._points = {"trained": {n: Points() for n in METRICS}, "held_out": {n: Points() for n in METRICS}}
        self._last: dict[str, dict[str, float]] = {"trained": {}, "held_out": {}}
        self._step, self._skipped = 0, 0
        self._tokens_per_second: float | None = None
        for metrics in history:
            self(metrics)
        self._first, self._began = self._step, clock()

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        with self._lock:
            self._step = metrics["step"]
            self._skipped += "skipped_pairs" in metrics
            self._tokens_per_second = metrics.get("tokens_per_second")
            for side, before in (("trained", ""), ("held_out", _HELD_OUT)):
                for name in METRICS:
                    value = metrics.get(before + name)
                    if isinstance(value, int | float) and value - value == 0:  # neither infinite nor no number
                        self._points[side][name].add(value)
                        self._last[side][name] = value

    def content(self) -> bytes:
        """JSON: step, num_steps, skipped, workers, tokens_per_second, seconds_left, gpu_memory; and for `trained` and
        `held_out` the metrics by the names that people know, each with its `last` value and `points`."""
        with self._lock:
            made, seconds = self._step - self._first, self._clock() - self._began
            left = (self._num_steps - self._step) * seconds / made if made else None
            found = {
                "step": self._step,
                "num_steps": self._num_steps,
                "skipped": self._skipped,
                "workers": self._num_workers,
                "tokens_per_second": self._tokens_per_second,
                "seconds_left": left,
                "gpu_memory": self._memory() if self._memory is not None else None,
                **{
                    side: {
                        METRICS[name]: {"last": last, "points": [float(f"{v:.4g}") for v in points[name].values]}
                        for name, last in self._last[side].items()
                    }
                    for side, points in self._points.items()
                },
            }
        return json.dumps(found).encode()
