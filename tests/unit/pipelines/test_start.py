"""Nights that go on from the published model: what they train from, against which reference, and their lineage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import Train, parse_config
from dpo_ray.errors import ConfigError
from dpo_ray.storage.lineage import read_policy
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import rollback
from pipelines.lineage import lines, trace_back
from tests.command_line import in_process, summary_of
from tests.whole_run import Job, number_rows, pair_id, word_model

OLD, NEW = number_rows(0, 12), number_rows(100, 12)
PUBLISHED = {"train": {"start": "published"}}


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Job:
    """Two nights that go on from what is published, the first with nothing to go on from."""
    folder = tmp_path_factory.mktemp("start")
    job = Job(folder, word_model(folder / "model", small_model), train={"global_batch_size": 2, "start": "published"})
    job.write("old.jsonl", OLD)
    job.logs, job.versions, job.summaries = [], [], []  # type: ignore[attr-defined]
    for rows in (None, NEW):
        if rows:
            job.write("new.jsonl", rows)
        done = job.run()
        assert done.code == 0, done.log
        job.logs.append(done)  # type: ignore[attr-defined]
        job.versions.append(job.published())  # type: ignore[attr-defined]
        job.summaries.append(summary_of(job.output))  # type: ignore[attr-defined]
    return job


@pytest.fixture
def job(nights: Job, tmp_path: Path) -> Any:
    """What the nights have left, in a place of the test's own."""
    shutil.copytree(nights.output, tmp_path / "out", copy_function=shutil.copy2)
    mine = Job(tmp_path, nights.model, **PUBLISHED)
    mine.data = nights.data
    mine.configure(**PUBLISHED)
    mine.versions = nights.versions  # type: ignore[attr-defined]
    return mine


def test_with_nothing_published_the_model_itself_is_where_it_starts(nights: Any):
    [said] = nights.logs[0].lines("train.start=published: training starts from")
    assert said.endswith(f"{nights.model}, for nothing is published under this name yet")


def test_the_second_night_starts_from_the_first_and_keeps_the_reference(nights: Any):
    first, second = nights.versions
    [said] = nights.logs[1].lines("train.start=published: training starts from")
    assert said.endswith(f"out/models/numbers/{first}") and first != second
    assert nights.logs[1].lines("[reference] 2 of 4 shards are finished already, 2 to compute")
    before, after = nights.summaries
    assert after["train"]["started_from"].endswith(first)
    assert before["reference"]["engine"] == after["reference"]["engine"]
    card = (nights.output / "models/numbers" / second / "README.md").read_text()
    assert f"trained from `{nights.output}/models/numbers/{first}`" in card


def test_the_lineage_goes_by_way_of_the_first(nights: Any):
    output, (first, second) = Location.of(nights.output), nights.versions
    record = read_policy(output, second)
    assert record is not None and record.parent == first
    assert [one["policy"] for one in trace_back(output, "numbers")["policies"]] == [second, first]
    said = "\n".join(lines(trace_back(output, "numbers")))
    assert f"the policy {first}, whose data it has seen as well" in said


def test_what_only_the_first_was_trained_on_the_second_has_seen_too(job: Any):
    output, (first, second) = Location.of(job.output), job.versions
    job.data = job.output.parent / "only"
    job.configure(**PUBLISHED)
    job.write("later.jsonl", number_rows(200, 12))
    assert (done := job.run()).code == 0, done.log
    third = job.published()
    fates = {
        one["version"]: (one["fate"], one["by"])
        for row in OLD
        for one in trace_back(output, pair_id(row))["models"]
        if one["fate"] == "trained"
    }
    assert fates == {first: ("trained", None), second: ("trained", None), third: ("trained", second)}
    answer = trace_back(output, "old.jsonl")
    assert {(one["version"], one["by"]) for one in answer["models"]} == {
        (first, None), (second, None), (second, first), (third, second), (third, first)
    }  # fmt: skip
    assert "3 of 3 published models were trained on rows of it" in next(lines(answer))


def test_the_same_data_once_more_are_nothing_new(job: Any):
    done = job.run()
    assert done.code == 0 and done.lines("nothing new"), done.log
    assert job.published() == job.versions[1]


def test_after_a_rollback_nothing_is_new_either(job: Any):
    rollback(Location.of(job.output), "numbers", "it swears")
    assert job.published() == job.versions[0]
    done = job.run()
    assert done.code == 0 and done.lines(f"have made {job.versions[1]} already"), done.log
    assert job.published() == job.versions[0]


def test_a_published_model_of_another_base_is_refused_before_anything_is_scored(job: Any, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(job.model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    done = job.run("-o", f"model.path={other}")
    assert done.code == 2 and "descends from" in done.log and not done.lines("[reference]"), done.log
    assert "Set train.start=base" in done.log


def test_a_published_model_that_is_not_there_is_refused(job: Any):
    shutil.rmtree(job.output / "models/numbers" / job.published())
    done = job.run()
    assert done.code == 2 and "is not there as a whole" in done.log


def test_what_a_training_is_known_by_does_not_change_with_the_option():
    assert Train(start="published").identity() == Train().identity() and "start" not in Train().identity()


def test_an_adapter_of_a_merged_model_is_refused():
    tree = {
        "run": {"name": "n", "output": "o"},
        "model": {"path": "m", "lora": {"rank": 4}},
        "data": {"train": "x"},
        "train": {"start": "published"},
    }
    with pytest.raises(ConfigError, match=r"set model\.lora\.export=merged, or train\.start=base"):
        parse_config(tree)


@pytest.mark.parametrize("command", ["sweep", "iterate"])
def test_searches_and_rounds_start_from_the_model(command: str):
    config = {"sweep": "sweep_cpu.yaml", "iterate": "demo_cpu.yaml"}[command]
    path = Path(__file__).parents[3] / "pipelines" / "configs" / config
    options = ["-o", "train.start=published", "-o", "iterate.rounds=2"][: 2 if command == "sweep" else 4]
    done = in_process(command, str(path), *options, "--dry-run")
    assert done.code == 2 and f"in `dpo-ray {command}`" in done.log, done.log


def test_it_is_no_option_to_search():
    path = Path(__file__).parents[3] / "pipelines" / "configs" / "align_cpu.yaml"
    search = "tune={space: {train.start: {choice: [base, published]}}}"
    done = in_process("sweep", str(path), "-o", search, "--dry-run")
    assert done.code == 2 and "train.start cannot be searched: trials start from model.path" in done.log
