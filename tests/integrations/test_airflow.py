"""The Airflow examples by Airflow itself: DAGs over real runs of dpo-ray, and pods as Kubernetes is asked for them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import DPO_RAY, LONGEST
from tests.integrations.kubernetes_api import api_server
from tests.integrations.orchestrated import DAYS, EXAMPLES, ROWS, Project, python_of, told_by
from tests.unit.cluster.manifests import mistakes, parse

pytestmark = pytest.mark.integration

PYTHON = python_of("Airflow")
BASH, KUBERNETES = EXAMPLES / "airflow_bash.py", EXAMPLES / "airflow_kubernetes.py"
DAY_AFTER = f"{DAYS[2]}T00:00:00"  # its interval is DAYS[1]


@pytest.fixture(scope="module")
def airflow(tmp_path_factory) -> dict[str, str]:
    """The environment of an Airflow with a database of its own."""
    home = tmp_path_factory.mktemp("airflow_home")
    env = os.environ | {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
    }
    (home / "dags").mkdir()
    command = [PYTHON, "-m", "airflow", "db", "migrate"]
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONGEST
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return env


def outcomes(airflow: dict[str, str], example: Path, folder: Path, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `dag.test()` came to, step by step."""
    for old in Path(airflow["AIRFLOW__CORE__DAGS_FOLDER"]).iterdir():
        old.unlink()
    copied = Path(airflow["AIRFLOW__CORE__DAGS_FOLDER"]) / example.name
    copied.write_text(example.read_text())
    request = {"steps": [{"file": str(copied), **step} for step in steps]}
    found: list[dict[str, Any]] = told_by(PYTHON, "in_airflow.py", folder, request, airflow)
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model, write_preferences) -> Project:
    return Project(tmp_path_factory.mktemp("airflow"), tiny_model, write_preferences)


@pytest.fixture(scope="module")
def nights(airflow: dict[str, str], project: Project) -> list[dict[str, Any]]:
    """One that publishes, one with nothing new, one whose gate fails, one without a configuration; and a day."""
    ours = {"DPO_RAY": DPO_RAY, "DPO_RAY_OUTPUT": str(project.output)}
    configs = [project.config, project.config, project.strict, "/nowhere.yaml"]
    steps: list[dict[str, Any]] = [
        {"dag": "dpo_ray_nightly", "env": {**ours, "DPO_RAY_CONFIG": config}} for config in configs
    ]
    day = {"dag": "dpo_ray_days", "logical_date": DAY_AFTER, "env": {**ours, "DPO_RAY_CONFIG": project.strict}}
    return outcomes(airflow, BASH, project.folder, [*steps, day])


def test_a_night_publishes_and_tells_what_comes_after(nights, project: Project):
    night = nights[0]
    assert night["tasks"] == {"run": "success", "published": "success"}
    told = night["xcoms"]["published"]
    assert told["model"].endswith(project.pointer["version"]) and not told["nothing_new"]
    assert told["input"]["rows"] == 3 * ROWS and told["accuracy"]["n"] > 0
    assert night["xcoms"]["run"] == f"dpo_ray_nightly.{night['run_id']}.1"
    assert project.summary(night["xcoms"]["run"])["exit_code"] == 0


def test_a_night_without_anything_new_succeeds(nights):
    first, night = nights[:2]
    assert night["tasks"] == {"run": "success", "published": "success"}
    told = night["xcoms"]["published"]
    assert told["nothing_new"] and told["model"] == first["xcoms"]["published"]["model"]


def test_a_gate_that_fails_skips_the_task_and_what_comes_after(nights, project: Project):
    night = nights[2]
    assert night["tasks"] == {"run": "skipped", "published": "skipped"} and night["state"] == "success"
    assert project.summary(f"dpo_ray_nightly.{night['run_id']}.1")["exit_code"] == 4
    assert project.pointer["version"] == nights[0]["xcoms"]["published"]["model"].rpartition("/")[2]


def test_any_other_exit_code_is_a_failure(nights):
    assert nights[3]["tasks"] == {"run": "failed", "published": "upstream_failed"}
    assert nights[3]["state"] == "failed"


def test_the_data_interval_chooses_the_days(nights, project: Project):
    day = nights[4]
    summary = project.summary(f"dpo_ray_days.{day['run_id']}.1")
    assert summary["input"]["chosen_by"] == {"data.since": DAYS[1], "data.until": DAYS[1]}
    assert summary["input"]["days"] == {DAYS[1]: {"files": 1, "rows": ROWS}}
    assert summary["train"]["started_from"].endswith(project.pointer["version"])
    assert day["tasks"]["run"] == "skipped"  # for its gate fails


def test_days_are_gone_through_in_order_by_a_backfill(airflow: dict[str, str], nights):
    # `nights` has stored the DAGs, and a run of the third day.
    command = ["backfill", "create", "--dag-id", "dpo_ray_days", "--from-date", DAYS[0], "--to-date", DAYS[1]]
    done = subprocess.run(
        [PYTHON, "-m", "airflow", *command, "--dry-run"], env=airflow, capture_output=True, text=True, timeout=LONGEST
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout.partition("Runs to be attempted")[2]
    assert re.findall(r"^\| ([\d-]{10}) ", table, re.M) == [*DAYS[:2]]


@pytest.mark.parametrize(("exit_code", "state"), [(0, "success"), (4, "skipped"), (3, "failed")])
def test_a_pod_submits_the_run_and_its_exit_code_is_the_tasks_state(airflow, tmp_path, exit_code: int, state: str):
    with api_server(exit_code, tmp_path / "kubeconfig") as pods:
        env = {"KUBECONFIG": str(tmp_path / "kubeconfig")}
        steps = [{"dag": "dpo_ray_days", "logical_date": DAY_AFTER, "env": env}, {"dag": "dpo_ray_nightly", "env": env}]
        found = outcomes(airflow, KUBERNETES, tmp_path, steps)
    assert [step["tasks"] for step in found] == [{"run": state}] * 2
    day, night = pods.made
    words = [
        container["command"] + container["args"] for pod in (day, night) for container in pod["spec"]["containers"]
    ]
    for line in words:
        parse(line)
    assert f"data.since={DAYS[1]}" in words[0] and f"data.until={DAYS[1]}" in words[0]
    assert "-o" not in words[1]
    for pod in (day, night):
        assert mistakes(pod) == []
        assert pod["metadata"]["namespace"] == "dpo-ray"
