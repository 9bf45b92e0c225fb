"""Runs, metrics and files in MLflow. Its model registry is in dpo_ray.tracking.registry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_ray.config.track import MLflow
from dpo_ray.tracking.credentials import without_credentials
from dpo_ray.tracking.mlflow_client import URI, client_of, may_pass
from dpo_ray.tracking.registry import Registry
from dpo_ray.tracking.tracker import Model, Opening, Point, State, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

_METRICS, _PARAMS, _LONGEST_VALUE = 1000, 100, 6000
"""What a request of log_batch takes, at most (the limits of MLflow's REST API)."""
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")
_EACH_HAS = "train/num_tokens"
_STATES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MLflowTracker(Tracker):
    """Args:
    options: with what run.name stands in for filled in (dpo_ray.tracking.chosen).
    """

    name = "mlflow"

    def __init__(self, options: MLflow) -> None:
        assert options.tracking_uri is not None and options.experiment is not None
        assert options.registered_model is not None
        self._uri, self._experiment = options.tracking_uri, options.experiment
        self._model = options.registered_model
        self._runs: dict[str, str] = {}
        self._made: MlflowClient | None = None

    def open(self, opening: Opening, known: str | None) -> tuple[str, int]:
        known = known if known is None or self._goes_on(known) else None
        run_id = known or self._runs.get(opening.whose) or self._begin(opening)
        self._runs[opening.whose] = run_id
        # Params never change, and are taken again as they are.
        for some in _pieces(opening.params.items(), _PARAMS):
            self._client.log_batch(run_id, params=[_param(key, value) for key, value in some], synchronous=True)
        return run_id, self._last_step(run_id) if known is not None else 0

    def log(self, whose: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = (
            Metric(key, value, int(point.when * 1000), point.step)
            for point in points
            for key, value in point.values.items()
        )
        for some in _pieces(metrics, _METRICS):
            self._client.log_batch(self._runs[whose], metrics=some, synchronous=True)

    def conclude(self, whose: str, point: Point) -> None:
        known = self._client.get_run(self._runs[whose]).data.metrics
        new = {key: value for key, value in point.values.items() if known.get(key) != value}
        self.log(whose, [Point(point.step, point.when, new)])

    def keep(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self._runs[""], str(file))

    def register(self, model: Model) -> None:
        Registry(self._client, self._model).register(model, self._runs[""])

    def close(self, whose: str, state: State) -> None:
        self._client.set_terminated(self._runs[whose], _STATES[state])
        del self._runs[whose]  # not before: it may fail, and is tried again

    def may_pass(self, error: Exception) -> bool:
        return may_pass(error)

    def way_out(self) -> str:
        return (
            f"See that {without_credentials(self._uri)} answers (track.mlflow.tracking_uri, or {URI}) and that this "
            "user may write there, or leave track.mlflow out."
        )

    @property
    def _client(self) -> MlflowClient:
        if self._made is None:
            self._made = client_of(self._uri)
        return self._made

    def _begin(self, opening: Opening) -> str:
        tags = {"mlflow.parentRunId": self._runs[""]} if opening.whose else {}
        run = self._client.create_run(self._experiment_id(), run_name=opening.name, tags=tags)
        return str(run.info.run_id)

    def _goes_on(self, run_id: str) -> bool:
        """Whether an earlier run is there, and runs again: not one that was deleted, or is another server's."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code not in _NOT_THERE:
                raise
            return False
        return True

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self._experiment))
            except MlflowException as error:  # another run has just made it
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(self._experiment)
        assert found is not None
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _last_step(self, run_id: str) -> int:
        """Of the steps that were logged, by the history of a metric that each of them has; one of which a batch brought
        a part is given again, and MLflow keeps equal points once."""
        known = self._client.get_run(run_id).data.metrics
        keys = [_EACH_HAS] if _EACH_HAS in known else [key for key in known if key.startswith(("train/", "eval/"))]
        steps = [m.step for key in keys for m in self._client.get_metric_history(run_id, key)]
        return max(steps, default=0)


def _param(key: str, value: str) -> Any:
    from mlflow.entities import Param

    return Param(key, value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 1]}…")


def _pieces(items: Any, size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
