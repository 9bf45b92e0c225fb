"""Submitting a run to a Ray cluster as a job."""

from __future__ import annotations

import asyncio
import shlex
import sys
import uuid
from pathlib import Path

from dpo_ray.errors import ConfigError, DpoRayError


def submit_job(
    config: Path,
    address: str,
    *,
    command: str,
    overrides: list[str],
    submission_id: str | None,
    python: str,
    wait: bool,
) -> int:
    """Ship the configuration, run `dpo-ray <command>` there and, if asked to wait, stream its log.

    Returns the exit status of the job's own process, 0 without waiting.
    Raises ConfigError where the cluster is not reached or the submission id is taken.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"No Ray dashboard answers at {address} ({' '.join(str(error).split())[:200]}). Name the head's dashboard, "
            "as in http://127.0.0.1:8265; from outside a Kubernetes cluster, forward its port first."
        ) from error
    arguments = [python, "-m", "pipelines.cli", command, config.name]
    for override in overrides:
        arguments += ["-o", override]
    try:
        job = client.submit_job(
            entrypoint=shlex.join(arguments),
            submission_id=submission_id or f"dpo-ray-{uuid.uuid4().hex[:10]}",
            # Only the folder's YAML files travel; the cluster's own installation of dpo-ray runs.
            runtime_env={"working_dir": str(config.absolute().parent), "excludes": ["*", "!*.yaml"]},
        )
    except RuntimeError as error:
        raise ConfigError(
            f"The job was not accepted at {address}: {' '.join(str(error).split())[-300:]} A submission id is used "
            "once; to run again, leave --submission-id out or name another."
        ) from error
    print(f"Submitted {job}. Its log: ray job logs --address {address} {job}", file=sys.stderr, flush=True)
    if not wait:
        return 0
    asyncio.run(_follow(client, job))
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.driver_exit_code is None:
        raise DpoRayError(f"The job {job} ended as {info.status} without an exit code: {info.message}")
    return info.driver_exit_code


async def _follow(client, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
