"""What is said where a cluster does not take a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import submit
from cluster.submit import Submission, submit_job
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, DpoRayError


class Taking:
    """A client of a cluster that takes every job."""

    def __init__(self, given: str | None):
        self.given = given

    def submit_job(self, **asked: Any) -> str:
        return str(asked["submission_id"])


class Refusing:
    """A client of a cluster that takes no job."""

    def __init__(self, error: Exception):
        self.error = error

    def submit_job(self, **_: Any) -> str:
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (
            RuntimeError("Request failed with status code 400: Job with submission_id nightly already exists."),
            ConfigError,
            "A submission id is used once; to run again, leave --submission-id out or name another",
        ),
        (
            RuntimeError("Request failed with status code 500: No available agent to submit job, please try again."),
            DpoRayError,
            "No available agent .* may accept it in a minute",
        ),
        (
            ConnectionError("Connection aborted."),
            DpoRayError,
            "lost while the job nightly was handed to it .* `dpo-ray job status nightly` tells",
        ),
    ],
)
def test_why_a_job_was_not_taken_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[DpoRayError], said: str
):
    config = Config.model_validate(
        {"run": {"name": "night", "output": str(tmp_path)}, "model": {"path": "m"}, "data": {"train": "/d"}}
    )
    monkeypatch.setattr(submit, "connected", lambda address: Refusing(error))
    with pytest.raises(expected, match=said) as raised:
        submit_job(config, None, Submission("run", submission_id="nightly"), wait=False)
    assert type(raised.value) is expected


def test_what_is_told_of_a_job_can_be_pasted_into_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = Config.model_validate(
        {"run": {"name": "night", "output": str(tmp_path)}, "model": {"path": "m"}, "data": {"train": "/d"}}
    )
    monkeypatch.setattr(submit, "connected", Taking)
    submit_job(config, "http://head:8265", Submission("run", submission_id="night 3"), wait=False)
    assert "`dpo-ray job logs 'night 3' --address http://head:8265 --follow`" in capsys.readouterr().err
