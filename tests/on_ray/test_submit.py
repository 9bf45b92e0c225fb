"""Jobs on a Ray head of our own, on loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

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


def submit(
    head: str, command: str, settings: dict, *more: str, config: str = "align_cpu.yaml", env: dict | None = None
):
    arguments = [str(CONFIGS / config), "--address", head, "--command", command]
    arguments += [] if "--executable" in more else ["--executable", DPO_RAY]
    env = env or {"RAY_AUTH_MODE": "disabled"}
    return dpo_ray("submit", *arguments, *more, *overrides(**settings), env=env)


def test_a_submitted_job_streams_its_log_and_returns_0(head, job_settings, tmp_path):
    done = submit(head, "ingest", job_settings, "--submission-id", "night-1")
    assert done.code == 0, done.log
    assert done.lines("[ingest] done: 12 rows")
    assert (tmp_path / "out" / "runs" / "night-1" / "summary.json").exists()
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


REWARD = """
def short(prompt: str, completion: str, finished: bool) -> float:
    return -float(len(completion))
"""


def test_a_rule_that_lies_here_and_what_is_named_travel(head, job_settings, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (here / "my_rules.py").write_text(REWARD)
    (here / "more").mkdir()
    (here / "more" / "note.txt").write_text("it came along")
    monkeypatch.chdir(here)
    monkeypatch.setenv("MY_SECRET", "told to the job")
    environment = tmp_path / "env.yaml"
    environment.write_text("env_vars: {ANOTHER: one}\n")
    program = tmp_path / "program"
    program.write_text(
        "#!/bin/sh\ncat more/note.txt; echo; echo $MY_SECRET, $ANOTHER; grep my_rules config.yaml\n"
        f"{sys.executable} -c 'from my_rules import short; print(short(None, str(12345), True))'\n"
    )
    program.chmod(0o755)
    generate = {"prompts": "/nowhere/prompts.jsonl", "reward": "my_rules:short"}
    settings = {k: v for k, v in job_settings.items() if k != "data__train"} | {"generate": generate}
    more = ["--ship", "more", "--env", "MY_SECRET", "--runtime-env", str(environment), "--executable", str(program)]
    done = submit(head, "generate", settings, *more, config="demo_cpu.yaml")
    assert done.code == 0, done.log
    assert "and with it more, my_rules.py" in done.log
    for line in ("it came along", "told to the job, one", "function: my_rules:short", "-5.0"):
        assert line in done.log, done.log


def test_a_period_runs_once_and_again_after_it_failed(head, job_settings):
    nothing = {**job_settings, "data__train": "/nowhere/*.parquet"}
    first, second = (submit(head, "ingest", nothing, "--period", "2026-11-01") for _ in range(2))
    assert first.code == second.code == 3
    names = [re.search(r"Submitted (aligned-2026-11-01-\w{8}(-2)?)\.", done.log) for done in (first, second)]
    assert names[0] and names[1] and names[1][1] == f"{names[0][1]}-2"
    good = [submit(head, "ingest", job_settings, "--period", "2026-11-01") for _ in range(2)]
    assert [done.code for done in good] == [0, 0], good[1].log
    assert "Submitted" in good[0].log and "SUCCEEDED: it is not run twice" in good[1].log
    assert not good[1].lines("[ingest]")


def test_a_job_is_watched_and_ended(head, job_settings, tmp_path):
    program = tmp_path / "slow"
    program.write_text("#!/bin/sh\necho begun; exec sleep 600\n")
    program.chmod(0o755)
    more = ["--executable", str(program), "--submission-id", "slow-1", "--no-wait"]
    assert submit(head, "ingest", job_settings, *more).code == 0

    def job(*words: str):
        return dpo_ray("job", *words, env={"RAY_AUTH_MODE": "disabled", "RAY_API_SERVER_ADDRESS": head})

    deadline = time.monotonic() + LONGEST
    while "begun" not in job("logs", "slow-1").log:
        assert time.monotonic() < deadline
    stands = job("status", "slow-1")
    assert stands.code == 0 and stands.lines("slow-1: RUNNING; began ")
    assert job("cancel", "slow-1").lines("slow-1: STOPPED")
    ended = job("status", "slow-1")
    assert ended.code == 1 and "The job slow-1 is STOPPED and has no exit status" in ended.log
    unknown = job("logs", "fast-1")
    assert unknown.code == 2 and "The cluster knows no job fast-1" in unknown.log


@pytest.mark.long
def test_a_cluster_that_wants_a_token_says_so(job_settings):
    with ray_head(token="a" * 64) as guarded:
        refused = submit(guarded.dashboard, "ingest", job_settings)
        assert refused.code == 2
        assert "does not let us in; here RAY_AUTH_MODE is disabled, and" in refused.log
        admitted = submit(guarded.dashboard, "ingest", job_settings, env=guarded.env)
        assert admitted.code == 0, admitted.log


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
