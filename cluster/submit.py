"""Submitting a run to a Ray cluster as a job."""

from __future__ import annotations

import asyncio
import shlex
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from dpo_ray.config import Config, dump_config
from dpo_ray.errors import ConfigError, DpoRayError

_SHIPPED = "config.yaml"


def submit_job(
    config: Config,
    address: str,
    *,
    command: str,
    submission_id: str | None,
    executable: str,
    wait: bool,
) -> int:
    """Ship the resolved configuration, run `dpo-ray <command>` on the cluster and, if asked to wait, stream its log.

    Only the configuration travels; the cluster's own installation of dpo-ray runs it. Paths in it are the cluster's.

    Args:
        address: the head's dashboard, as in http://127.0.0.1:8265.
        submission_id: a name that the cluster accepts once.
        executable: what to call there: dpo-ray, or its absolute path.

    Returns the exit status of the job's own process, 0 without waiting.
    Raises ConfigError where the cluster is not reached, the submission id is taken or run.output is a relative path,
    DpoRayError where the job ended without an exit status.
    """
    config.run.require_absolute_output()
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"No Ray dashboard answers at {address} ({_short(error)}). Name the head's dashboard, as in "
            "http://127.0.0.1:8265; from outside a Kubernetes cluster, forward its port first."
        ) from error
    with tempfile.TemporaryDirectory(prefix="dpo-ray-submit-") as folder:
        (Path(folder) / _SHIPPED).write_text(dump_config(config), encoding="utf-8")
        try:
            job = client.submit_job(
                entrypoint=shlex.join([executable, command, _SHIPPED]),
                submission_id=submission_id or f"dpo-ray-{uuid.uuid4().hex[:10]}",
                runtime_env={"working_dir": folder},
            )
        except RuntimeError as error:
            raise ConfigError(
                f"The job was not accepted at {address}: {_short(error)} A submission id is used once; to run again, "
                "leave --submission-id out or name another."
            ) from error
    sys.stderr.write(f"Submitted {job}. Its log: ray job logs --address {address} {job}\n")
    if not wait:
        return 0
    asyncio.run(_follow(client, job))
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.driver_exit_code is None:
        raise DpoRayError(f"The job {job} ended as {info.status} without an exit status: {info.message}")
    return int(info.driver_exit_code)


async def _follow(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[-300:]
