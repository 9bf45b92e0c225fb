"""The pages that a run leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import DataError
from dpo_ray.storage.artifact import Artifact, Contents, entry_of, publish
from dpo_ray.storage.location import Location
from dpo_ray.tracking.steps import StepWriter, steps_folder
from pipelines.context import RunContext
from pipelines.evaluate import KIND, SAMPLES, tell_measured
from tests.command_line import summary_of
from tests.reports import samples
from tests.whole_run import Job, number_rows, word_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    return word_model(tmp_path_factory.mktemp("words") / "model", small_model)


def page_of(job: Job, run_id: str, name: str = "report.html") -> str:
    return (job.output / "runs" / run_id / name).read_text()


def test_the_second_run_tells_what_changed_since_the_first_and_how_to_have_it_again(tmp_path: Path, model: Path):
    job = Job(tmp_path, model)
    job.write("a.jsonl", number_rows(0, 40))
    assert job.run("--run-id", "first").code == 0
    version = job.published()
    assert "What changed" not in page_of(job, "first")
    job.write("b.jsonl", number_rows(100, 20))
    assert job.run("--run-id", "second", "-o", "train.learning_rate=3e-6").code == 0
    page = page_of(job, "second")
    changed = page[page.index('<section id="changes"') : page.index('<section id="gate"')]
    assert f"Before it stood {version}" in changed and "made by the run first" in changed
    assert "train.learning_rate" in changed and "pairs of preference data" in changed
    assert 'href="../first/report.html"' in changed
    summary = summary_of(job.output)
    command = f"dpo-ray run {job.output}/runs/second/config.yaml"
    assert summary["command"] == command and command in page and command in page_of(job, "second", "report.md")
    assert summary["versions"]["torch"] in page


def test_what_changed_since_a_sweep_is_told_by_its_chosen_trial(tmp_path: Path, model: Path):
    job = Job(tmp_path, model)
    job.write("a.jsonl", number_rows(0, 40))
    assert job.run("--run-id", "first").code == 0
    first = job.output / "runs" / "first"
    chosen = yaml.safe_load((first / "config.yaml").read_text())
    chosen["train"]["learning_rate"] = 7e-6
    (first / "best.yaml").write_text(yaml.safe_dump(chosen))
    assert job.run("--run-id", "second", "-o", "train.learning_rate=3e-6").code == 0
    page = page_of(job, "second", "report.md").replace("\\", "")
    assert "| train.learning_rate | 7e-06 | 3e-06 |" in page


def test_a_run_that_fails_has_its_pages_too(tmp_path: Path, model: Path):
    job = Job(tmp_path, model)
    job.write("a.jsonl", [{"prompt": "1", "chosen": "2", "rejected": None}] * 4)
    done = job.run("--run-id", "failed")
    assert done.code == 3
    assert "null_field" in page_of(job, "failed") and "null\\_field" in page_of(job, "failed", "report.md")


@pytest.mark.parametrize("tracked", ["true", "false"])
def test_a_training_that_dies_shows_its_curves_up_to_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tracked: str
):
    def dies(output: Location, config: Config, rows: Artifact, location: Location, steering: Any) -> Contents:
        for first in (1, 3):  # the second worker makes step 3 again
            writer = StepWriter(steps_folder(location))
            for step in range(first, first + 3):
                writer.add({"step": step, "loss": 1.0 / step, "eval_loss": 2.0 / step})
            writer.close()
        raise DataError("step 6 is damaged.")

    monkeypatch.setattr("tests.whole_run.nudge", dies)
    job = Job(tmp_path, model)
    job.write("a.jsonl", number_rows(0, 40))
    done = job.run("--run-id", "died", "-o", f"track.tensorboard={tracked}")
    assert done.code == 3 and "step 6 is damaged" in done.log
    metrics = (job.output / "runs" / "died" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4, 5]
    page = page_of(job, "died", "report.md")
    assert "Training did not come to its end. The curves go up to step 5" in page and "### Loss" in page


def test_metrics_of_a_training_that_died_and_cannot_be_read_hide_no_error(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    def dies(output: Location, config: Config, rows: Artifact, location: Location, steering: Any) -> Contents:
        (steps_folder(location) / "000000.jsonl").write_bytes(b"{")
        raise DataError("step 6 is damaged.")

    monkeypatch.setattr("tests.whole_run.nudge", dies)
    job = Job(tmp_path, model)
    job.write("a.jsonl", number_rows(0, 40))
    done = job.run("--run-id", "died")
    assert done.code == 3 and "step 6 is damaged" in done.log.strip().splitlines()[-1]
    assert "the metrics up to where it ended could not be kept" in done.log
    assert not (job.output / "runs" / "died" / "metrics.jsonl").exists()


def test_a_report_that_cannot_be_made_is_told_and_changes_nothing_else(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(document: object) -> str:
        raise RuntimeError("no drawing today")

    monkeypatch.setattr("pipelines.report.html_page", fails)
    job = Job(tmp_path, model)
    job.write("a.jsonl", [{"prompt": "1", "chosen": "2", "rejected": None}] * 4)
    done = job.run("--run-id", "failed")
    assert done.code == 3 and "null_field" in done.log.strip().splitlines()[-1]
    assert "report.html could not be made: RuntimeError: no drawing today" in done.log
    assert summary_of(job.output)["exit_code"] == 3


def test_a_stage_alone_says_how_far_it_went(tmp_path: Path, model: Path):
    job = Job(tmp_path, model)
    job.write("a.jsonl", number_rows(0, 20))
    assert job.run("--run-id", "some", command="tokenize").code == 0
    assert "was to end with the stage data_report" in page_of(job, "some")
    assert "dpo-ray tokenize" in summary_of(job.output)["command"]


@pytest.mark.parametrize(("wanted", "told", "shown"), [(0, 0, 0), (5, 5, 5), (60, 8, 30)])
def test_so_many_samples_are_told_as_report_samples_says(tmp_path: Path, wanted: int, told: int, shown: int):
    tree: dict[str, Any] = {"run": {"name": "n", "output": str(tmp_path)}, "model": {"path": "m"}}
    config = parse_config({**tree, "data": {"train": "t"}, "report": {"samples": wanted}})
    context = RunContext(config, "r", Location.of(tmp_path))
    folder = Location.of(tmp_path / "evaluation")
    (folder / SAMPLES).write_bytes(content := json.dumps(samples(30)).encode())
    artifact = publish(folder, KIND, identity={}, inputs={}, files=[entry_of(SAMPLES, content)])
    tell_measured(context, artifact)
    assert (len(context.results["samples"]), len(context.shown["samples"])) == (told, shown)
