"""A run that would make again what is published: it says so, and computes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.on_ray import session
from dpo_ray.storage.finished import NotFinished, about_to_compute, only_finished
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import history, rollback
from tests.command_line import Finished, in_process, summary_of
from tests.whole_run import Job, number_rows, word_model

DATA = {"held_out_fraction": 0.5, "rows_per_shard": 50}  # of fewer held-out pairs than 30 a gate does not compare
GATE = {"gate": {"accuracy_above": None, "no_regression": {"held_out": 0.99}}}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Job:
    folder = tmp_path_factory.mktemp("nothing_new")
    job = Job(folder, word_model(folder / "model", small_model), publish=GATE, data=DATA)
    job.write("a.parquet", number_rows(0, 90))
    assert (done := job.run()).code == 0, done.log
    return job


@pytest.fixture
def job(published: Job, tmp_path: Path) -> Job:
    """A copy of the job after its first run."""
    shutil.copytree(published.data, tmp_path / "data", copy_function=shutil.copy2)
    shutil.copytree(published.output, tmp_path / "out", copy_function=shutil.copy2)
    return Job(tmp_path, published.model, publish=GATE, data=DATA)


def again(job: Job, *arguments: str) -> Finished:
    """The same command with neither a cluster nor stand-ins for one."""
    return in_process("run", str(job.path), *arguments)


def refuse() -> None:
    raise ConfigError("the cluster is joined")


def summary(job: Job) -> dict[str, Any]:
    return summary_of(job.output)


def moves(job: Job) -> int:
    return len(history(Location.of(job.output / "models/numbers")))


def test_the_same_again_says_which_version_stands_and_moves_nothing(job: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody is there: a run that joins the cluster fails
    monkeypatch.setattr(session, "join", refuse)
    assert again(job).code == 2  # the copied files have other places: they are to be looked through
    monkeypatch.delenv("RAY_ADDRESS")
    assert job.run().code == 0
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    before = moves(job)
    done = again(job)
    assert done.code == 0, done.log
    assert done.lines(f"nothing new: these data and this configuration have made {job.published()} already")
    assert done.lines(f"numbers/{job.published()} stands, since ")
    told = summary(job)
    assert told["exit_code"] == 0 and told["nothing_new"]["version"] == job.published()
    assert told["published"].endswith(job.published()) and moves(job) == before
    assert told["stages"] and all(stage["reused"] for stage in told["stages"].values())
    assert not done.lines("reused:")


def test_a_new_file_or_another_option_is_something_new(job: Job):
    assert job.run().code == 0
    for arguments in ([], ["-o", "train.learning_rate=0.5"]):
        if not arguments:
            job.write("b.parquet", number_rows(100, 12))
        before = job.published()
        done = job.run(*arguments)
        assert done.code == 0, done.log
        assert job.published() != before and not done.lines("nothing new")
        assert job.run(*arguments).lines("nothing new")
    found = summary(job)["input"]
    assert (found["files"], found["rows"], found["new_files"], found["new_rows"]) == (2, 102, 0, 0)
    assert found["compared_with"] == job.published()


def test_the_same_rows_in_another_file_of_the_same_bytes_are_nothing_new(job: Job):
    assert job.run().code == 0
    (job.data / "a.parquet").rename(job.data / "renamed.parquet")
    done = job.run()  # it is looked through
    assert done.code == 0 and summary(job)["input"]["new_files"] == 0
    assert again(job).lines("nothing new")


def test_a_stricter_gate_is_asked_even_of_a_model_that_is_published(job: Job):
    assert job.run().code == 0
    done = job.run("-o", "publish.gate.accuracy_above=0.999")
    assert done.code == 4, done.log
    done = job.run("-o", "evaluate.max_pairs=3")
    assert done.code == 0 and not done.lines("nothing new")


def test_after_a_rollback_the_decision_stands(job: Job):
    job.write("b.parquet", number_rows(100, 12))
    assert job.run().code == 0
    newer = job.published()
    rollback(Location.of(job.output), "numbers", "it swears")
    before = moves(job)
    done = again(job)
    assert done.code == 0, done.log
    assert done.lines(f"have made {newer} already") and done.lines("by rollback of ")
    assert job.published() != newer and moves(job) == before


def test_what_was_removed_of_the_published_model_is_made_again(job: Job):
    assert job.run().code == 0
    shutil.rmtree(job.output / "models/numbers" / job.published())
    done = job.run()
    assert done.code == 0 and not done.lines("nothing new")
    assert (job.output / "models/numbers" / job.published() / "README.md").exists()


def test_nothing_is_new_only_for_what_publishes(job: Job):
    assert job.run().code == 0
    done = job.run(command="evaluate")
    assert done.code == 0 and not done.lines("nothing new") and done.lines("reused:")


def test_a_damaged_record_is_still_an_error(job: Job):
    assert job.run().code == 0
    pointer = job.output / "models/numbers/latest.json"
    pointer.write_text("{")
    assert job.run().code == 3
    json.loads((job.output / "runs").joinpath(summary(job)["run_id"], "summary.json").read_text())


def test_of_a_model_that_was_published_without_its_lineage_it_is_kept_then(job: Job):
    assert job.run().code == 0
    kept = job.output / "lineage/policies" / f"{job.published()}.json"
    before = json.loads(kept.read_text())
    shutil.rmtree(job.output / "lineage")
    assert again(job).lines("nothing new")
    after = json.loads(kept.read_text())
    assert after["shards"] == before["shards"]
    assert [file["sha256"] for file in after["sources"]] == [file["sha256"] for file in before["sources"]]


def test_only_within_the_block_work_is_refused():
    about_to_compute("a")
    with only_finished(), pytest.raises(NotFinished, match="b"):
        about_to_compute("b")
    about_to_compute("c")


def test_what_stands_is_pushed_while_nobody_else_publishes(job: Job, monkeypatch: pytest.MonkeyPatch):
    assert job.run().code == 0
    pushed: list[str] = []

    def push(context: Any, version: Location) -> None:
        [lease] = (job.output / "leases").glob("models-*.json")
        assert json.loads(lease.read_text())["held"]
        pushed.append(version.name)

    monkeypatch.setattr("pipelines.nothing_new.push", push)
    monkeypatch.setenv("HF_TOKEN", "secret")
    done = again(job, "-o", "publish.push_to_hub={repo_id: owner/name}")
    assert done.code == 0 and done.lines("nothing new"), done.log
    assert pushed == [job.published()]
