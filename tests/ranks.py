"""Several ranks of a training in one process, a thread each, that exchange what ranks of a process group would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dpo_ray.training import pair_metrics, step
from dpo_ray.training.parallel import Rank


class Ranks:
    """So many ranks; what one hands over waits until all others have handed over theirs."""

    def __init__(self, world_size: int) -> None:
        self.all = [Rank(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
        self._barrier = threading.Barrier(world_size)
        self._given: list[Any] = [None] * world_size

    def run(self, work: Callable[[Rank], Any]) -> list[Any]:
        """What the work of each rank returns."""
        exchanges = (
            (pair_metrics, "summed", self._summed),
            (step, "gathered", self._gathered),
            (step, "gathered_objects", self._exchanged),
        )
        with ExitStack() as patched, ThreadPoolExecutor(len(self.all)) as threads:
            for module, name, exchange in exchanges:
                patched.enter_context(mock.patch.object(module, name, exchange))
            return [future.result() for future in [threads.submit(self._run, work, me) for me in self.all]]

    def _run(self, work: Callable[[Rank], Any], me: Rank) -> Any:
        try:
            return work(me)
        except BaseException:
            self._barrier.abort()  # the others would wait for it
            raise

    def _exchanged(self, value: Any, me: Rank) -> list[Any]:
        self._given[me.rank] = value
        self._barrier.wait()
        everything = list(self._given)
        self._barrier.wait()
        return everything

    def _summed(self, values: Tensor, me: Rank) -> Tensor:
        return torch.stack(self._exchanged(values, me)).sum(0)

    def _gathered(self, values: Tensor, me: Rank) -> list[Tensor]:
        return self._exchanged(values, me)
