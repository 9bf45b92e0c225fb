"""What the trackers of a whole run are told."""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_ray.config import parse_config
from dpo_ray.errors import ConfigError
from dpo_ray.storage.location import Location
from dpo_ray.storage.process import this_machine
from dpo_ray.tracking.chosen import mlflow_options, require_trackers
from dpo_ray.tracking.registry import source_of
from dpo_ray.tracking.tensorboard import events
from dpo_ray.tracking.tracker import Point
from pipelines.tracking import tell_evaluation
from tests.command_line import summary_of
from tests.whole_run import Job, number_rows, without_an_end, word_model


@pytest.fixture
def job(tmp_path: Path, small_model: Path) -> Job:
    job = Job(tmp_path, word_model(tmp_path / "model", small_model))
    job.write("a.jsonl", number_rows(0, 24))
    return job


def scalars(folder: Path) -> list[tuple[str, int]]:
    return [(v.tag, e.step) for e in events(Location.of(folder)) for v in e.summary.value if v.HasField("simple_value")]


def test_a_run_is_in_tensorboard_by_itself(job: Job):
    assert job.run().code == 0
    [run] = (job.output / "runs").iterdir()
    found = scalars(run / "tensorboard")
    assert found[:2] == [("train/loss", 1), ("train/tokens_per_second", 1)]
    assert ("evaluation/accuracy_low", 1) in found and len(found) == len(set(found))
    told = summary_of(job.output)["trackers"]
    where = str(run / "tensorboard")
    assert told == {"tensorboard": {"runs": {"": where}, "failures": 0, "steps_not_logged": 0, "reason": None}}
    assert json.loads((run / "trackers.json").read_text()) == {"tensorboard": {"": {"id": where}}}


def test_a_run_that_was_killed_is_gone_on_with_in_the_same_events(job: Job):
    assert job.run("--run-id", "first").code == 0
    without_an_end(job, "first", process="0")
    before = scalars(job.output / "runs" / "first" / "tensorboard")
    assert job.run("--run-id", "second").code == 0
    assert scalars(job.output / "runs" / "first" / "tensorboard") == before
    assert not (job.output / "runs" / "second" / "tensorboard").exists()


@pytest.mark.parametrize("machine", [this_machine(), "another"], ids=["this", "another"])
def test_a_run_that_is_still_at_work_keeps_its_events_to_itself(machine: str, job: Job):
    assert job.run("--run-id", "first").code == 0
    without_an_end(job, "first", machine=machine)
    before = scalars(job.output / "runs" / "first" / "tensorboard")
    assert job.run("--run-id", "second").code == 0
    assert scalars(job.output / "runs" / "first" / "tensorboard") == before
    assert (job.output / "runs" / "second" / "tensorboard").is_dir()


def test_one_of_another_machine_that_gave_no_sign_for_long_is_gone_on_with(job: Job):
    assert job.run("--run-id", "first").code == 0
    without_an_end(job, "first", machine="another")
    long_ago = time.time() - 60
    os.utime(job.output / "runs" / "first" / "progress.json", (long_ago, long_ago))
    assert job.run("--run-id", "second").code == 0
    assert not (job.output / "runs" / "second" / "tensorboard").exists()


def test_a_task_with_a_filter_has_a_name_that_all_trackers_take():
    told: list[Point] = []
    context = SimpleNamespace(trackers=SimpleNamespace(conclude=lambda whose, point: told.append(point)))
    policy = SimpleNamespace(manifest=SimpleNamespace(metrics={"num_steps": 3}))
    tasks = [{"task": "gsm8k", "metric": "exact_match,strict-match", "tuned": {"value": 0.5}}]
    tell_evaluation(context, policy, {"tasks": tasks})  # type: ignore[arg-type]
    assert told[0].values == {"evaluation/tasks/gsm8k/exact_match_strict-match": 0.5}


def test_without_trackers_there_are_none(job: Job):
    job.configure(track={"tensorboard": False})
    assert job.run().code == 0
    [run] = (job.output / "runs").iterdir()
    assert not (run / "tensorboard").exists() and "trackers" not in summary_of(job.output)
    assert not (job.output / "tracked").exists()


def test_a_run_that_fails_its_gate_is_still_tracked(job: Job):
    job.configure(publish={"gate": {"accuracy_above": 0.99}})
    assert job.run().code == 4
    [run] = (job.output / "runs").iterdir()
    assert ("train/loss", 1) in scalars(run / "tensorboard")


def config_with(output: str = "o", **track: Any) -> Any:
    return parse_config(
        {"run": {"name": "n", "output": output}, "model": {"path": "m"}, "data": {"train": "t"}, "track": track}
    )


@pytest.mark.parametrize(
    ("section", "options"), [("mlflow", {"tracking_uri": "http://x"}), ("wandb", {"project": "p"})]
)
def test_a_tracker_that_is_not_installed_is_told_with_how_to_install_it(section: str, options: dict[str, str]):
    if find_spec(section) is not None:
        pytest.skip(f"{section} is installed")
    with pytest.raises(ConfigError, match=rf"track.{section} needs {section}.*pip install 'dpo-ray\[{section}\]'"):
        require_trackers(config_with(**{section: options}))


def test_an_offline_run_is_not_left_on_a_machine_that_goes_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dpo_ray.tracking.chosen.find_spec", lambda name: name)
    require_trackers(config_with(wandb={"project": "p", "mode": "offline"}))
    require_trackers(config_with("s3://bucket/out", wandb={"project": "p"}))
    with pytest.raises(ConfigError, match=r"run\.output is s3://bucket/out: .*Set track\.wandb\.mode=online"):
        require_trackers(config_with("s3://bucket/out", wandb={"project": "p", "mode": "offline"}))


def test_mlflow_takes_its_server_from_the_environment_and_its_names_from_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="names no tracking_uri, and MLFLOW_TRACKING_URI is not set"):
        mlflow_options(config_with(mlflow={}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@server:5000")
    found = mlflow_options(config_with(mlflow={"experiment": "e"}))
    assert found.tracking_uri == "http://user:secret@server:5000"
    assert (found.experiment, found.registered_model) == ("e", "n")


def test_a_uri_with_a_password_is_refused_without_repeating_it():
    with pytest.raises(ConfigError, match="holds credentials") as error:
        config_with(mlflow={"tracking_uri": "http://user:secret@server:5000"})
    assert "secret" not in str(error.value)


def test_a_folder_of_this_machine_is_named_with_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dpo_ray.tracking.registry.node", lambda: "gpu-1")
    assert source_of("/out/models/a b/v") == "dpo-ray://gpu-1/out/models/a%20b/v"
    assert source_of("s3://bucket/models/n/v") == "s3://bucket/models/n/v"
