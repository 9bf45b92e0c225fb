"""The Dagster example by Dagster itself, over real runs of dpo-ray: assets, the gate as a check, days as partitions."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import DPO_RAY, LONGEST
from tests.integrations.orchestrated import DAYS, EXAMPLES, ROWS, Project, python_of, told_by
from tests.unit.cluster.manifests import parse

pytestmark = pytest.mark.integration

PYTHON = python_of("Dagster")
FIRST, SECOND, THIRD = DAYS
STEPS = [
    {"what": "data", "partition": FIRST},
    {"what": "data", "range": [SECOND, THIRD]},
    {"what": "nightly"},
    {"what": "model"},
    {"what": "model", "resource": {"options": ["-o", "publish.gate.accuracy_above=0.999"]}},
    {"what": "model", "resource": {"config": "/nowhere.yaml"}},
]


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model, write_preferences) -> Project:
    return Project(tmp_path_factory.mktemp("dagster"), tiny_model, write_preferences)


@pytest.fixture(scope="module")
def told(project: Project) -> dict[str, Any]:
    return tell(project, STEPS)


def environment(project: Project) -> dict[str, str]:
    return os.environ | {
        "DPO_RAY_CONFIG": project.config,
        "DPO_RAY_OUTPUT": str(project.output),
        "PATH": f"{Path(DPO_RAY).parent}:{os.environ['PATH']}",
        "DAGSTER_HOME": str(project.folder),
    }


def request(project: Project, steps: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "example": str(EXAMPLES / "dagster_assets.py"),
        "config": project.config,
        "output": str(project.output),
        "program": DPO_RAY,
        "steps": steps,
        **more,
    }


def tell(project: Project, steps: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What came of each of the steps, in order."""
    asked = request(project, steps, **more)
    found: dict[str, Any] = told_by(PYTHON, "in_dagster.py", project.folder, asked, environment(project))
    return found


@pytest.fixture
def steps(told: dict[str, Any]) -> list[dict[str, Any]]:
    return told["steps"]


def made(step: dict[str, Any], asset: str) -> dict[str, Any]:
    [one] = [one for one in step["made"] if one["asset"] == asset]
    return one


def test_a_day_is_a_partition_whose_assets_tell_what_their_manifests_do(steps, project: Project):
    step = steps[0]
    assert step["success"] and {one["partition"] for one in step["made"]} == {FIRST}
    assert [one["asset"] for one in step["made"]] == ["pairs", "tokenized", "reference"]
    summary = project.summary(f"dagster-{step['run_id']}")
    assert summary["input"]["chosen_by"] == {"data.since": FIRST, "data.until": FIRST}
    pairs, reference = made(step, "pairs"), made(step, "reference")
    assert pairs["metadata"]["dagster/row_count"] == ROWS
    assert pairs["metadata"]["input"]["days"] == {FIRST: {"files": 1, "rows": ROWS}}
    assert reference["version"] == summary["stages"]["reference"]["fingerprint"]
    assert reference["metadata"]["engine"] == "torch" and reference["metadata"]["calibration"]["num_sequences"] == 8
    for one in step["made"]:
        assert Path(one["metadata"]["manifest"]).is_file()


def test_a_range_of_days_is_one_run(told, steps, project: Project):
    step = steps[1]
    assert step["success"] and {one["partition"] for one in step["made"]} == {SECOND, THIRD}
    chosen = project.summary(f"dagster-{step['run_id']}")["input"]["chosen_by"]
    assert chosen == {"data.since": SECOND, "data.until": THIRD}
    assert told["materialized"] == list(DAYS)


def test_the_nightly_job_publishes_a_model_that_passed_its_check(steps, project: Project):
    step = steps[2]
    assert step["success"], step["failure"]
    [check] = step["checks"]
    assert check["name"] == "gate" and check["passed"] and check["metadata"]["exit_code"] == 0
    assert check["metadata"]["accuracy"]["low"] < check["metadata"]["accuracy"]["value"]
    model, policy = made(step, "published_model"), made(step, "policy")
    assert model["version"] == policy["version"] == project.pointer["version"]
    assert Path(model["metadata"]["model"], "model.safetensors").is_file()
    assert Path(model["metadata"]["report"]).is_file() and not model["metadata"]["nothing_new"]
    assert policy["metadata"]["final"]["loss"] > 0 and not policy["metadata"]["reused"]


def test_what_the_days_have_scored_is_taken_over(steps, project: Project):
    log = (project.output / "runs" / f"dagster-{steps[2]['run_id']}" / "log.txt").read_text()
    for kind in ("pairs", "tokenized", "reference"):
        assert f"[{kind}] 3 of 3 shards are finished already, 0 to compute" in log


def test_a_night_without_anything_new_leaves_every_version_as_it_was(steps):
    before, step = steps[2:4]
    assert step["success"] and step["checks"][0]["passed"]
    model = made(step, "published_model")
    assert model["metadata"]["nothing_new"] and model["version"] == made(before, "published_model")["version"]
    assert made(step, "policy")["metadata"]["reused"] and made(step, "deployed")


def test_a_gate_that_fails_is_a_failed_check_and_what_comes_after_is_skipped(steps, project: Project):
    step = steps[4]
    assert step["success"] and step["skipped"] == ["deployed"]
    assert [one["asset"] for one in step["made"]] == ["policy"]
    [check] = step["checks"]
    assert not check["passed"] and check["metadata"]["exit_code"] == 4
    assert "the gate does not hold" in check["description"]
    assert project.pointer["version"] == made(steps[2], "published_model")["version"]


RECORDER = """#!/bin/bash
[ "$1" != show ] || exec cat {summary}
(printf '%q ' "$@"; echo) >> {calls}
{then}
"""


def recorder(folder: Path, then: str = "", summary: Path | None = None) -> tuple[Path, Path]:
    """A program in dpo-ray's place, and the file with the words that it was called with."""
    calls, program = folder / "calls", folder / "recorder"
    program.write_text(RECORDER.format(summary=summary, calls=calls, then=then))
    program.chmod(0o755)
    return program, calls


def test_with_an_address_a_job_is_submitted_that_is_called_like_its_run(project: Project, steps, tmp_path: Path):
    # Whose run is then called like the job: tests/on_ray/test_submit.py.
    published = project.output / "runs" / f"dagster-{steps[2]['run_id']}" / "summary.json"
    program, calls = recorder(tmp_path, summary=published)
    resource = {"program": str(program), "address": "http://127.0.0.1:8265"}
    asked = [
        {"what": what, "resource": resource, **more} for what, more in (("data", {"partition": FIRST}), ("model", {}))
    ]
    told = tell(project, asked)["steps"]
    lines = [shlex.split(line) for line in calls.read_text().splitlines()]
    for step, line, command in zip(told, lines, ("reference", "run"), strict=True):
        assert step["success"]
        parse(["dpo-ray", *line])
        assert line[0] == "submit" and line[line.index("--command") + 1] == command
        assert line[line.index("--submission-id") + 1] == f"dagster-{step['run_id']}"


@pytest.mark.parametrize(
    ("partitions", "step", "chosen"),
    [
        (
            'dg.StaticPartitionsDefinition(["language=de", "language=en"])',
            {"partition": "language=de"},
            ["language=de"],
        ),
        (
            'dg.StaticPartitionsDefinition(["language=de", "language=en", "language=fr"])',
            {"range": ["language=de", "language=en"]},
            ["language=de", "language=en"],
        ),
        ("None", {}, []),
    ],
)
def test_partitions_may_have_other_names_or_there_are_none(
    project: Project, steps, tmp_path: Path, partitions: str, step: dict[str, Any], chosen: list[str]
):
    edited = tmp_path / "dagster_assets.py"
    days = 'dg.DailyPartitionsDefinition(start_date="2026-11-01")'
    source = (EXAMPLES / "dagster_assets.py").read_text()
    assert days in source
    edited.write_text(source.replace(days, partitions))
    program, calls = recorder(
        tmp_path, summary=project.output / "runs" / f"dagster-{steps[2]['run_id']}" / "summary.json"
    )
    asked = [{"what": "data", "resource": {"program": str(program)}, **step}]
    [told] = tell(project, asked, example=str(edited))["steps"]
    assert told["success"] and {one["partition"] for one in told["made"]} == ({*chosen} or {None})
    line = shlex.split(calls.read_text())
    parse(["dpo-ray", *line])
    options = [value for option, value in pairwise(line) if option == "-o" and "partitions" in value]
    assert [json.loads(one.removeprefix("data.partitions=")) for one in options] == ([chosen] if chosen else [])


def test_a_failure_that_may_pass_is_tried_again_as_another_run(project: Project, tmp_path: Path):
    program, calls = recorder(tmp_path, then="echo; echo 'LeaseLost: it is gone'; exit 1")
    [step] = tell(project, [{"what": "model", "resource": {"program": str(program)}}])["steps"]
    assert not step["success"] and step["retries"] == 2
    assert step["failure"]["description"] == "dpo-ray run ended with exit code 1. LeaseLost: it is gone"
    names = [re.findall(r"--run-id (\S+)", line) for line in calls.read_text().splitlines()]
    assert names == [[f"dagster-{step['run_id']}{attempt}"] for attempt in ("", "-1", "-2")]


def test_a_run_that_is_ended_ends_the_program_and_cancels_the_job(project: Project, tmp_path: Path):
    wait = 'trap "echo interrupted >> $0.told; exit 130" INT\n[ "$1" = job ] || while :; do sleep 0.1; done'
    program, calls = recorder(tmp_path, then=wait)
    asked = request(project, [{"what": "model", "resource": {"program": str(program), "address": "http://head:8265"}}])
    command = [PYTHON, str(Path(__file__).with_name("in_dagster.py")), str(tmp_path / "answer.json")]
    (tmp_path / "request.json").write_text(json.dumps(asked))
    with (tmp_path / "request.json").open() as words, (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=words, stdout=log, stderr=log, env=environment(project))
    deadline = time.monotonic() + LONGEST
    while not calls.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(LONGEST)
    submitted, cancelled = map(shlex.split, calls.read_text().splitlines())
    name = submitted[submitted.index("--submission-id") + 1]
    assert cancelled == ["job", "cancel", name, "--address", "http://head:8265"]
    parse(["dpo-ray", *cancelled])
    assert (tmp_path / "recorder.told").read_text() == "interrupted\n"
    assert "Execution was interrupted" in (tmp_path / "log").read_text()


def test_the_file_is_loaded_by_the_command_line_of_dagster(project: Project):
    command = [PYTHON, "-m", "dagster", "definitions", "validate", "-f", str(EXAMPLES / "dagster_assets.py")]
    done = subprocess.run(command, env=environment(project), capture_output=True, text=True, timeout=LONGEST)
    assert done.returncode == 0, done.stderr


def test_another_failure_is_told_by_its_last_words_and_configuration_is_not_tried_again(steps):
    step = steps[5]
    assert not step["success"] and step["retries"] == 0
    assert step["failure"]["metadata"]["exit_code"] == 2
    description = step["failure"]["description"]
    assert description.startswith(
        "dpo-ray run ended with exit code 2. ConfigError: There is no configuration file /nowh"
    )
