"""A training whose controller runs in this process, so that whoever called for it can stop it.

Ray Train gives a controller an actor of its own. For a trial of a sweep, itself an actor, that is one process more to
start and to keep, and nobody ends it well: when Ray Tune stops a trial, the trial's process is killed, and the
placement group of the workers stays taken, unless a watcher finds it by the dashboard. Here a stop cancels the
controller where it waits, its workers end, and their placement group is given back before the call returns.

It uses what Ray 2.60 does not promise to keep (how DataParallelTrainer makes its controller), hence the pinned version.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ReportCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup

PLACEMENT_GROUP = "placement_group"
"""Key under which the id of the placement group of a training's workers is told."""


class Stopped(BaseException):
    """The training was stopped from outside. Not an Exception: nothing between is to take it for a failure."""


class Hold:
    """What a training that is held can be stopped by, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._cancel: Callable[[], Any] | None = None

    def stop(self) -> None:
        """Have the training end, now or when it begins; it raises Stopped where it runs."""
        with self._lock:
            self._stopped = True
            if self._cancel is not None:
                self._cancel()

    def require_going(self) -> None:
        """Raises Stopped where the training is not to begin any more."""
        if self._stopped:
            raise Stopped

    def run(self, make_controller: Callable[[], TrainController]) -> Result:
        """Run a controller to its end. Raises Stopped."""
        try:
            return asyncio.run(self._control(make_controller))
        except asyncio.CancelledError:
            raise Stopped from None

    async def _control(self, make_controller: Callable[[], TrainController]) -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with self._lock:
            if self._stopped:
                raise asyncio.CancelledError
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        controller = make_controller()
        try:
            await controller.run()
        finally:
            with self._lock:
                self._cancel = None  # the loop closes
            group = controller.get_worker_group()
            if group is not None:  # it did not come to its own end
                group.shutdown()
        return controller.get_result()


class HeldTrainer(TorchTrainer):
    """TorchTrainer with its controller here.

    Args:
        hold: stops it.
        tell: called, in this thread, with the metrics of each report of rank 0 that has any, and with the id of the
            placement group of the workers as soon as there is one.
    """

    def __init__(self, *args: Any, hold: Hold, tell: Callable[[dict[str, Any]], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hold = hold
        self._tell = tell

    def _create_default_callbacks(self) -> list[Any]:
        kept = [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]
        return [*kept, _Reports(self._tell)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        tell = self._tell

        class Group(WorkerGroup):
            def _create_placement_group(self, *args: Any) -> Any:
                handle = super()._create_placement_group(*args)
                tell({PLACEMENT_GROUP: handle.placement_group.id.hex()})
                return handle

        class Controller(TrainController):
            worker_group_cls = Group

        return self._hold.run(lambda: Controller(**arguments))


class _Reports(ReportCallback):
    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        if metrics[0]:
            self._tell(metrics[0])
