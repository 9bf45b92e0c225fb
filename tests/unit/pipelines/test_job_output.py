"""Where a job on a cluster writes: never below the working directory that Ray makes for it and removes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.submit import Submission, submit_job
from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError
from pipelines.context import RunContext

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def config(output: str) -> Config:
    return parse_config({"run": {"name": "n", "output": output}, "model": {"path": "m"}, "data": {"train": "x"}})


@pytest.mark.parametrize("output", ["runs/out", "./out"])
def test_a_relative_output_is_refused_before_it_is_shipped(output: str):
    with pytest.raises(ConfigError, match=rf"run\.output is {output}, a relative path.*s3://"):
        submit_job(config(output), "http://127.0.0.1:9", Submission("run"), wait=True)


def test_in_a_job_that_ray_was_given_a_relative_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(JOB, "{}")
    with pytest.raises(ConfigError, match=r"run\.output is out, a relative path"):
        RunContext.start(config("out"))
    assert list(tmp_path.iterdir()) == []
    RunContext.start(config(str(tmp_path / "absolute")))
    monkeypatch.delenv(JOB)
    RunContext.start(config("out"))
    assert {child.name for child in tmp_path.iterdir()} == {"absolute", "out"}
