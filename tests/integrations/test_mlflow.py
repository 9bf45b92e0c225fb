"""Runs in a real MLflow server: followed while they train, registered past their gate, and without it when it dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from dpo_ray.config import Config, MLflow
from dpo_ray.storage.artifact import Artifact, Contents
from dpo_ray.storage.location import Location
from dpo_ray.tracking.mlflow import MLflowTracker
from dpo_ray.tracking.steps import StepWriter, steps_folder
from dpo_ray.tracking.tracker import Opening
from tests import whole_run
from tests.command_line import CONFIGS, LONGEST, Finished, in_process, overrides, summary_of
from tests.whole_run import Job, nudge, number_rows, without_an_end, word_model

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed: make test-mlflow has it"),
]

STEPS = 5


class Server:
    """One, with what it keeps in a folder."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._log = (folder / "server.log").open("w")
        where = ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", f"{folder}/artifacts"]
        command = [sys.executable, "-m", "mlflow", "server", *where, "--port", str(port), "--workers", "1"]
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, start_new_session=True, env={**os.environ, "NO_COLOR": "1"}
        )
        deadline = time.monotonic() + LONGEST
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, Path(self._log.name).read_text()
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def client(self) -> MlflowClient:
        from dpo_ray.tracking.mlflow_client import client_of

        return client_of(self.uri)

    def runs(self, experiment: str) -> list[Any]:
        found = self.client().get_experiment_by_name(experiment)
        return list(self.client().search_runs([found.experiment_id])) if found is not None else []

    def steps(self, run_id: str) -> list[int]:
        return [metric.step for metric in self.client().get_metric_history(run_id, "train/loss")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("mlflow"))
    yield found
    found.kill()


def until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LONGEST
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def job(server: Server, tmp_path: Path, small_model: Path) -> Job:
    """Its experiment and its registered model are the test's own."""
    track = {"mlflow": {"tracking_uri": server.uri, "experiment": tmp_path.name, "registered_model": tmp_path.name}}
    job = Job(tmp_path, word_model(tmp_path / "model", small_model), track=track)
    job.write("a.jsonl", number_rows(0, 24))
    return job


def told_while_training(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None], steps: int = STEPS) -> None:
    """Have trainings tell steps as their workers do, and do something before they end."""

    def training(output: Location, config: Config, rows: Artifact, location: Location, steering: Any) -> Contents:
        writer = StepWriter(steps_folder(location), pause=0.1)
        for step in range(1, steps + 1):
            writer.add({"step": step, "loss": 0.7 - step / 100, "rewards/margins": step / 10})
        writer.close()
        then()
        return nudge(output, config, rows, location, steering)

    monkeypatch.setattr(whole_run, "nudge", training)


def test_a_run_is_seen_while_it_trains_and_whole_when_it_has_ended(
    server: Server, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []

    def look() -> None:
        until(
            lambda: server.runs(tmp_path.name) and len(server.steps(server.runs(tmp_path.name)[0].info.run_id)) >= STEPS
        )
        seen.extend(server.runs(tmp_path.name))

    told_while_training(monkeypatch, look)
    assert (done := job.run("--run-id", "night")).code == 0, done.log
    [live] = seen
    assert live.info.status == "RUNNING" and live.info.run_name == "night"
    [run] = server.runs(tmp_path.name)
    assert run.info.run_id == live.info.run_id and run.info.status == "FINISHED"
    assert server.steps(run.info.run_id) == list(range(1, STEPS + 1))
    assert run.data.params["train.loss.beta"] == "0.1" and run.data.params["run.name"] == "numbers"
    assert {"evaluation/accuracy", "evaluation/accuracy_low", "evaluation/accuracy_high"} <= run.data.metrics.keys()
    kept = {file.path for file in server.client().list_artifacts(run.info.run_id)}
    assert kept == {"config.yaml", "summary.json", "report.html"}
    version = server.client().get_model_version_by_alias(tmp_path.name, "champion")
    assert version.run_id == run.info.run_id and version.tags["dpo_ray.version"] == job.published()
    assert version.source.endswith(f"/models/numbers/{job.published()}") and version.source.startswith("dpo-ray://")
    told = summary_of(job.output)["trackers"]["mlflow"]
    assert told == {"runs": {"": run.info.run_id}, "failures": 0, "steps_not_logged": 0, "reason": None}


def test_the_alias_follows_the_gate_and_who_moves_the_pointer(server: Server, job: Job, tmp_path: Path):
    def named(alias: str) -> str:
        version = server.client().get_model_version_by_alias(tmp_path.name, alias)
        return str(version.tags["dpo_ray.version"])

    assert job.run().code == 0
    first = job.published()
    assert job.run("-o", "train.learning_rate=0.5").code == 0
    assert named("champion") == job.published() != first
    refused = job.run("-o", "train.learning_rate=0.25", "-o", "publish.gate.accuracy_above=0.99")
    assert refused.code == 4
    assert named("candidate") not in {first, job.published()} and named("champion") == job.published()
    back = in_process("rollback", str(job.output), "numbers")
    assert back.code == 0 and f"MLflow: champion of {tmp_path.name} is {first} now" in back.log
    assert named("champion") == first == job.published()


def test_a_run_that_was_killed_goes_on_in_its_run_and_tells_no_step_twice(
    server: Server, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def until_seen(steps: int) -> None:
        until(
            lambda: (
                server.runs(tmp_path.name) and server.steps(server.runs(tmp_path.name)[0].info.run_id)[-1:] == [steps]
            )
        )

    def dies() -> None:
        until_seen(3)
        raise Killed

    with monkeypatch.context() as patch:
        told_while_training(patch, dies, steps=3)
        with pytest.raises(Killed):
            job.run("--run-id", "first")
    without_an_end(job, "first", process="0")
    told_while_training(monkeypatch, lambda: until_seen(STEPS))
    assert job.run("--run-id", "second").code == 0
    [run] = server.runs(tmp_path.name)
    assert run.info.status == "FINISHED" and server.steps(run.info.run_id) == list(range(1, STEPS + 1))


def test_without_its_server_a_run_goes_on_and_says_so_once(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
):
    server = Server(tmp_path)
    job = Job(tmp_path, word_model(tmp_path / "model", small_model), track={"mlflow": {"tracking_uri": server.uri}})
    job.write("a.jsonl", number_rows(0, 24))

    def kill() -> None:
        until(lambda: server.runs("numbers"))
        server.kill()

    told_while_training(monkeypatch, kill)
    done = job.run()
    assert done.code == 0 and job.published()
    [line] = done.lines("[track] mlflow")
    assert "The run goes on without it" in line and f"See that {server.uri} answers" in line
    assert summary_of(job.output)["trackers"]["mlflow"]["failures"] >= 1
    back = in_process("promote", str(job.output), "numbers", job.published())
    assert back.code == 0 and "was not moved" in back.log and "`dpo-ray promote`" in back.log


@pytest.fixture(scope="module")
def trained(server: Server, one_ray, tmp_path_factory, tiny_model, write_preferences) -> tuple[Finished, Path]:
    folder = tmp_path_factory.mktemp("mlflow_job")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Which colour has card {n}?"}],
            "chosen": [{"role": "assistant", "content": "red"}],
            "rejected": [{"role": "assistant", "content": "It has a colour, but I will not say which."}],
        }
        for n in range(40)
    ]
    write_preferences(folder / "data", rows)
    values = {
        "run__name": "cards",
        "run__output": str(folder / "out"),
        "model__path": str(tiny_model),
        "data__train": str(folder / "data" / "*.parquet"),
        "data__held_out_fraction": 0.25,
        "reference__engine": "torch",
        "reference__calibration_pairs": 4,
        "train__num_workers": 1,
        "train__tokens_per_microbatch": 1024,
        "train__global_batch_size": 8,
        "publish__gate__accuracy_above": None,
        "track__mlflow__tracking_uri": server.uri,
    }
    return one_ray("run", str(CONFIGS / "align_cpu.yaml"), *overrides(**values)), folder / "out"


def test_every_step_of_a_training_on_ray_is_there(server: Server, trained: tuple[Finished, Path]):
    done, output = trained
    assert done.code == 0, done.log
    [run] = server.runs("cards")
    [history] = (output / "runs").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    found = server.client().get_metric_history(run.info.run_id, "train/loss")
    assert {m.step: m.value for m in found} == {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines)


class Answers:
    """A client that notes what it is asked, and fails as told."""

    def __init__(self, gone: str | None = None, failing: int = 0) -> None:
        self.gone, self.failing = gone, failing
        self.made: list[str] = []
        self.histories: list[str] = []

    def update_run(self, run_id: str, status: str) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import ErrorCode

        if self.gone is not None:
            raise MlflowException(f"no run {run_id}", error_code=ErrorCode.Value(self.gone))

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="1", lifecycle_stage="active")

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        self.made.append(run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run-{len(self.made)}"))

    def log_batch(self, run_id: str, **given: Any) -> None:
        if self.failing:
            self.failing -= 1
            raise ConnectionError("no answer")

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(metrics={f"train/{n}": 1.0 for n in ("loss", "num_tokens", "x")}))

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        self.histories.append(key)
        return [SimpleNamespace(step=step) for step in (1, 2, 3)]


@pytest.fixture
def tracker() -> MLflowTracker:
    return MLflowTracker(MLflow(tracking_uri="http://127.0.0.1:9", experiment="e", registered_model="m"))


OPENING = Opening("", "night", {"a": "b"})


def test_a_run_is_made_once_however_often_its_params_are_refused(tracker: MLflowTracker):
    client = tracker._made = Answers(failing=2)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            tracker.open(OPENING, None)
    assert tracker.open(OPENING, None) == ("run-1", 0) and client.made == ["night"]


@pytest.mark.parametrize("code", ["RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"])
def test_an_earlier_run_that_was_deleted_is_begun_anew(code: str, tracker: MLflowTracker):
    tracker._made = Answers(gone=code)
    assert tracker.open(OPENING, "gone") == ("run-1", 0)


def test_an_earlier_run_is_gone_on_with_by_the_history_of_one_metric(tracker: MLflowTracker):
    client = tracker._made = Answers()
    assert tracker.open(OPENING, "known") == ("known", 3)
    assert client.made == [] and client.histories == ["train/num_tokens"]
