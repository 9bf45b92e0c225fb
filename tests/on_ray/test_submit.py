"""Jobs on a Ray head of our own, on loopback."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.command_line import CONFIGS, DPO_RAY, LONGEST, dpo_ray, overrides
from tests.on_ray.test_main_job import preference_rows
from tests.ray_head import RAY, ray_head

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def head():
    """The dashboard's address of a Ray head that lives as long as these tests."""
    with ray_head() as head:
        yield head.dashboard


@pytest.fixture
def job_settings(tmp_path, tiny_model, write_preferences):
    write_preferences(tmp_path / "data", preference_rows(0, 12))
    return {
        "run__output": str(tmp_path / "out"),
        "model__path": str(tiny_model),
        "data__train": str(tmp_path / "data" / "*.parquet"),
    }


def submit(head: str, command: str, settings: dict, *more: str):
    arguments = [str(CONFIGS / "align_cpu.yaml"), "--address", head, "--command", command, "--executable", DPO_RAY]
    return dpo_ray("submit", *arguments, *more, *overrides(**settings), env={"RAY_AUTH_MODE": "disabled"})


def test_a_submitted_job_streams_its_log_and_returns_0(head, job_settings, tmp_path):
    done = submit(head, "ingest", job_settings)
    assert done.code == 0, done.log
    assert done.lines("[ingest] done: 12 rows")
    assert list((tmp_path / "out" / "artifacts" / "pairs").glob("*/manifest.json"))


def test_a_failed_job_returns_its_own_exit_status(head, job_settings):
    done = submit(head, "ingest", {**job_settings, "data__train": "/nowhere/*.parquet"})
    assert done.code == 3, done.log
    assert done.lines("data.train is /nowhere/*.parquet")


def test_a_submission_id_is_accepted_once(head, job_settings):
    nothing = {**job_settings, "data__train": "/nowhere/*.parquet"}
    assert submit(head, "ingest", nothing, "--submission-id", "nightly-1", "--no-wait").code == 0
    again = submit(head, "ingest", nothing, "--submission-id", "nightly-1", "--no-wait")
    assert again.code == 2
    assert "accepted once" in again.log or "used once" in again.log


def test_plain_ray_job_submit_runs_the_same_command(head, job_settings):
    config = str(CONFIGS / "align_cpu.yaml")
    done = subprocess.run(
        [RAY, "job", "submit", "--address", head, "--", DPO_RAY, "ingest", config, *overrides(**job_settings)],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[ingest] done: 12 rows" in done.stdout


def test_a_relative_output_is_refused_before_it_is_shipped_and_in_a_plain_job(head, job_settings):
    relative = {**job_settings, "run__output": "runs/out"}
    refused = submit("http://127.0.0.1:9", "ingest", relative)
    assert refused.code == 2
    assert "run.output is runs/out, a relative path" in refused.log
    arguments = [DPO_RAY, "ingest", str(CONFIGS / "align_cpu.yaml"), *overrides(**relative)]
    done = subprocess.run(
        [RAY, "job", "submit", "--address", head, "--", *arguments],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    assert done.returncode != 0 and "run.output is runs/out, a relative path" in done.stdout


def test_no_cluster_at_the_address(job_settings):
    done = submit("http://127.0.0.1:9", "run", job_settings)
    assert done.code == 2
    assert "No Ray dashboard answers at http://127.0.0.1:9" in done.log
