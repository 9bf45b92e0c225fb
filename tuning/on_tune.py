"""Ray Tune runs trials: it is given one after the other, tells what they measure, and schedulers end some of them.

Nothing of what Tune keeps for itself is gone on from. What a sweep knows is in its records, and a scheduler is told
anew what earlier runs have measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, remove_placement_group

from dpo_ray.config.tune import ASHA, MedianStopping, Scheduler
from dpo_ray.on_ray.held_trainer import PLACEMENT_GROUP
from dpo_ray.on_ray.room import Need, Nodes, fitting
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from tuning.records import Evaluation
from tuning.trial import EVALUATION, FAILURE, SCORE, STEP, Ended, TrialActor, Work

_TUNE_ENV = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every result of a trial tells of an evaluation
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, as everywhere
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class Listener:
    """Told what becomes of the trials; each method does nothing."""

    def begins(self, name: str) -> None:
        """A trial has its process, for the first time or again."""

    def evaluated(self, name: str, evaluation: Evaluation, seconds: float) -> None:
        """It has measured something; the seconds are those of this run."""

    def ended(self, name: str, result: Ended, seconds: float) -> None:
        """It came to its end."""

    def stopped(self, name: str, seconds: float) -> None:
        """The scheduler ended it."""

    def failed(self, name: str, reason: str, *, again: bool) -> None:
        """An error ended it; `again`: it is tried once more."""


@dataclass(frozen=True)
class Past:
    """A trial of an earlier run, for the scheduler."""

    name: str
    scores: tuple[tuple[int, float], ...]
    """(step, score) of its evaluations."""


def run_trials(
    works: Iterator[Work],
    *,
    scheduler: TrialScheduler,
    output: Location,
    rows: Mapping[str, Artifact],
    at_once: int,
    max_failures: int,
    storage: Location,
    listener: Listener,
) -> None:
    """Run trials until there are no more. Ray must be connected.

    Args:
        works: asked for the next one when there is room for it.
        rows: key → what trials train on.
        at_once: trials that run side by side.
        max_failures: how often one that failed is tried again.
        storage: where Tune keeps what it needs meanwhile, seen by all nodes.
    """
    suggested = _Suggested(works)
    filesystem, path = storage.filesystem()
    actor = tune.with_parameters(TrialActor, output=output, rows=dict(rows))
    actor.__qualname__ = TrialActor.__qualname__  # under which its process is shown
    tuner = tune.Tuner(
        actor,
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=suggested,
            scheduler=scheduler,
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
            reuse_actors=True,  # a process that has loaded what it needs serves the next trial
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_Told(suggested, listener)],
            verbose=0,
        ),
    )
    with _environment(_TUNE_ENV):
        tuner.fit()
    (storage / "tune").remove_folder()


def make_scheduler(
    chosen: Scheduler | None, *, eval_every_steps: int, num_steps: int, past: Iterable[Past]
) -> TrialScheduler:
    """The scheduler, having been told of the trials of earlier runs.

    Args:
        chosen: None: each trial trains to its end.
        num_steps: of the longest trial.
    """
    common = {"time_attr": STEP, "metric": SCORE, "mode": "max"}
    match chosen:
        case ASHA():
            scheduler = AsyncHyperBandScheduler(
                **common,
                max_t=max(num_steps, 2),
                grace_period=min(chosen.grace_steps or eval_every_steps, max(num_steps - 1, 1)),
                reduction_factor=chosen.reduction_factor,
                stop_last_trials=False,  # who has come to the last step is finished
            )
        case MedianStopping():
            scheduler = MedianStoppingRule(
                **common, grace_period=chosen.grace_steps or eval_every_steps, min_samples_required=chosen.min_trials
            )
        case _:
            return FIFOScheduler()
    for trial in past:
        one = _PastTrial(trial.name)
        scheduler.on_trial_add(_NoController(), one)
        for step, score in trial.scores:
            scheduler.on_trial_result(_NoController(), one, {STEP: step, SCORE: score})
    return scheduler


class _PastTrial:
    """All that a scheduler asks of a trial that does not run."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


class _NoController:
    def get_live_trials(self) -> list[Any]:
        return []


class _NotKept:
    """Tune writes what it is given beside its trials, to go on from; nobody goes on from this."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Suggested(_NotKept, Searcher):  # type: ignore[misc]  # Ray is not followed
    """Tune asks for the next trial; which trial of ours an id of Tune's is."""

    def __init__(self, works: Iterator[Work]) -> None:
        super().__init__()
        self._works = works
        self.names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        work = next(self._works, None)
        if work is None:
            return str(Searcher.FINISHED)
        self.names[trial_id] = work.name
        return {"work": work}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass


class _Told(_NotKept, tune.Callback):  # type: ignore[misc]  # Ray is not followed
    """Tells the listener, and gives back what a trial that died has left."""

    def __init__(self, suggested: _Suggested, listener: Listener) -> None:
        self._names = suggested.names
        self._listener = listener
        self._groups: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._ended: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listener.begins(self._names[trial.trial_id])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        name = self._names[trial.trial_id]
        if PLACEMENT_GROUP in result:
            self._groups[name] = result[PLACEMENT_GROUP]
        elif FAILURE in result:
            self._reasons[name] = result[FAILURE]
        elif EVALUATION in result:
            self._listener.evaluated(name, result[EVALUATION], result["time_total_s"])
        elif "state" in result:
            self._ended.add(name)
            self._listener.ended(name, cast(Ended, result), result["time_total_s"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = self._names[trial.trial_id]
        if name not in self._ended:
            self._listener.stopped(name, trial.last_result["time_total_s"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._failed(trial, again=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._failed(trial, again=False)

    def _failed(self, trial: Any, *, again: bool) -> None:
        name = self._names[trial.trial_id]
        group = self._groups.pop(name, None)
        if group is not None:
            # A process that was killed could not give it back, and the next attempt would wait for its place.
            give_back(group)
        self._listener.failed(name, self._reasons.pop(name, "its process died"), again=again)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def forgotten_groups() -> list[str]:
    """Placement groups of this job that are still there: ids, as hex. After the last trial there should be none."""
    mine = ray.get_runtime_context().get_job_id()
    return [
        name
        for name, group in ray.util.placement_group_table().items()
        if name.endswith(mine) and group["state"] != "REMOVED"
    ]


def give_back(group: str) -> None:
    """Free what a placement group holds."""
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def places(nodes: Nodes, trial: Need) -> int:
    """Trials for which the nodes have room side by side, one at least."""
    there = fitting(nodes, trial.place)
    fits = [
        sum(node.resources.get(name, 0) for node in there) // (trial.processes * number)
        for name, number in trial.each.items()
    ]
    return max(1, int(min(fits)))
