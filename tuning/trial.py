"""One trial, as an actor of Ray Tune runs it: a thin driver of one training.

The training runs in a thread, with Ray Train's controller in this process (dpo_ray.on_ray.held_trainer); its workers
are processes of their own. `step` hands Tune one evaluation at a time. When Tune stops the trial, or has the actor go
on with another one, the training ends first and its workers' resources are free.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypedDict

from ray import tune

from dpo_ray.config import Config
from dpo_ray.config.tune import Measure
from dpo_ray.errors import Busy, ConfigError, DataError, NonFiniteLoss
from dpo_ray.on_ray.failures import reason_of
from dpo_ray.on_ray.held_trainer import PLACEMENT_GROUP, HeldTrainer, Hold, Stopped
from dpo_ray.on_ray.trainer import Steering, train_policy
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from dpo_ray.training.files import HISTORY
from tuning.measures import measured, score
from tuning.records import Evaluation

STEP, EVALUATION, SCORE = "step", "evaluation", "score"
"""Keys of a result that tells of an evaluation: after which step, the records' Evaluation, and what the scheduler goes
by, larger being better."""


_MEMORY = 1 << 20

FAILURE = "failure"
"""Key of a result that says why the next one is an error."""


@dataclass(frozen=True)
class Work:
    """What a trial is to do."""

    name: str
    config: Config
    rows: str
    """Key of what it trains on."""
    objective: dict[Measure, float]
    """What the scheduler goes by."""
    num_steps: int
    tokens_per_microbatch: int
    """What fits into the memory of one of its workers, or what is configured."""
    evaluated: tuple[Evaluation, ...] = ()
    """Of an earlier run: told again, and nothing is decided by them."""


class Ended(TypedDict):
    """A trial's last result."""

    done: Literal[True]
    state: Literal["finished", "diverged", "failed"]
    reason: str | None
    policy: str | None
    was_trained: bool
    first_step_loss: float | None
    num_steps: int | None
    published_step: int | None
    evaluations: list[Evaluation]


class TrialActor(tune.Trainable):  # type: ignore[misc]  # Ray is not followed
    """Trains `config["work"]`; an actor goes on with the next trial when one has ended.

    Args of setup:
        output: the folder run.output.
        rows: key → what trials train on.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        # It only waits for its workers, whom no CPU is to be taken from; but Tune wants something to be asked for.
        return tune.PlacementGroupFactory([{"memory": _MEMORY}])

    def setup(self, config: dict[str, Any], *, output: Location, rows: Mapping[str, Artifact]) -> None:
        self._output, self._rows = output, rows
        self._begin(config["work"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._attempt.stop()
        self._begin(new_config["work"])
        return True

    def _begin(self, work: Work) -> None:
        self._attempt = _Attempt(self._output, work, self._rows[work.rows])

    def step(self) -> dict[str, Any]:
        return self._attempt.result()

    def cleanup(self) -> None:
        self._attempt.stop()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}  # the training keeps its own, and goes on from them

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        pass


class _Attempt:
    """A training in a thread, and what it has told so far."""

    def __init__(self, output: Location, work: Work, rows: Artifact) -> None:
        self._output, self._work, self._rows = output, work, rows
        self._hold = Hold()
        # Schedulers read these of every result that ends a trial; what is not a number decides nothing.
        self._last: dict[str, Any] = {STEP: 0, SCORE: math.nan}
        self._results: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        for evaluation in work.evaluated:
            # Without a score: the scheduler has been told of it as of one of an earlier run, and then let it go on.
            self._results.put({STEP: evaluation["step"], EVALUATION: evaluation})
        self._thread = threading.Thread(target=self._run, name="training")
        self._thread.start()

    def result(self) -> dict[str, Any]:
        """The next thing that the training tells. Raises what ended it."""
        found = self._results.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def stop(self) -> None:
        """End the training, if it still runs; returns when its workers' resources are free."""
        self._hold.stop()
        self._thread.join()

    def _tell(self, told: dict[str, Any]) -> None:
        if PLACEMENT_GROUP in told:
            self._results.put(told)
        elif is_evaluation(told):
            self._put(evaluation_of(told))

    def _put(self, evaluation: Evaluation) -> None:
        result = {STEP: evaluation["step"], EVALUATION: evaluation}
        found = score(self._work.objective, evaluation["measured"])
        if found is not None and evaluation["step"] < self._work.num_steps:  # after the last step nothing is saved
            result[SCORE] = found[0]
        self._last |= {name: result[name] for name in (STEP, SCORE) if name in result}
        self._results.put(result)

    def _end(self, ended: Ended) -> None:
        self._results.put({**self._last, **ended})

    def _run(self) -> None:
        work = self._work
        steering = Steering(
            partial(HeldTrainer, hold=self._hold, tell=self._tell),
            work.name,
            work.tokens_per_microbatch,
            stop=self._hold.stop,
            while_waiting=self._hold.require_going,
        )
        run_id = f"{work.config.run.name}, {work.name}"
        try:
            policy, reused = train_policy(self._output, work.config, self._rows, steering, run_id=run_id)
            self._end(_finished(policy, was_trained=not reused))
        except Stopped:
            return
        except NonFiniteLoss as error:
            self._end(_ended("diverged", str(error)))
        except (Busy, ConfigError, DataError) as error:  # another attempt would end alike
            self._end(_ended("failed", str(error)))
        except BaseException as error:
            self._results.put({FAILURE: reason_of(error)})
            self._results.put(error)  # Tune is given it where it asks for the next result


def _finished(policy: Artifact, *, was_trained: bool) -> Ended:
    lines = policy.file(HISTORY).read_bytes().splitlines()
    metrics = policy.manifest.metrics
    return {
        "done": True,
        "state": "finished",
        "reason": None,
        "policy": policy.fingerprint,
        "was_trained": was_trained,
        "first_step_loss": metrics["first_step_loss"],
        "num_steps": metrics["num_steps"],
        "published_step": metrics["published_step"],
        "evaluations": [evaluation_of(line) for line in map(json.loads, lines) if is_evaluation(line)],
    }


def is_evaluation(metrics: Mapping[str, Any]) -> bool:
    return "eval_loss" in metrics


def evaluation_of(metrics: Mapping[str, Any]) -> Evaluation:
    return {"step": int(metrics["step"]), "loss": float(metrics["eval_loss"]), "measured": measured(metrics)}


def _ended(state: Literal["diverged", "failed"], reason: str) -> Ended:
    return {
        "done": True,
        "state": state,
        "reason": reason,
        "policy": None,
        "was_trained": False,
        "first_step_loss": None,
        "num_steps": None,
        "published_step": None,
        "evaluations": [],
    }
