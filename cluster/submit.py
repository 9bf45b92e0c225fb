"""Submitting a run to a Ray cluster as a job."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.jobs import Outcome, connected, follow, outcome, pasted
from cluster.shipment import CONFIG, packed, runtime_env
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, DpoRayError
from dpo_ray.origin import short

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_MOST_ATTEMPTS = 1000
_TAKEN = "already exists"  # Ray's client has no error of its own for it


@dataclass(frozen=True)
class Submission:
    """What is to run, and with what."""

    command: str
    """Of dpo-ray."""
    executable: str = "dpo-ray"
    """What to call there: dpo-ray, or its absolute path."""
    submission_id: str | None = None
    """A name that the cluster accepts once, and a plain name of a folder. None: one is made up."""
    period: str | None = None
    """What the run is for, as a day: the job's name is made of it and the configuration, and such a job runs once."""
    ship: Sequence[Path] = ()
    """Files and folders that lie beside the configuration in the job's folder, and whose modules can be imported."""
    env: Sequence[str] = ()
    """Environment variables of this process that the job is given."""
    runtime_env: Path | None = None
    """YAML with further fields of Ray's runtime environment."""


def submit_job(config: Config, address: str | None, submission: Submission, *, wait: bool) -> int:
    """Ship the resolved configuration, run `dpo-ray <command>` on the cluster and, if asked to wait, stream its log.

    The cluster's own installation of dpo-ray runs it. Paths in the configuration are the cluster's. The run is called
    like the job: its summary is in runs/<submission id> of run.output. Of a period, the job that runs or has succeeded
    already is followed or told of; after one that failed comes the next attempt.

    Args:
        address: the head's dashboard, as in http://127.0.0.1:8265; None: where Ray looks.

    Returns the exit status of the job's own process, 0 without waiting.
    Raises ConfigError where the cluster is not reached or refuses us, the submission id is taken, run.output is a
    relative path or something that is to travel is not there; DpoRayError where the cluster takes no job, is lost
    meanwhile, or the job ended without an exit status.
    """
    config.run.require_absolute_output()
    if submission.period is not None and submission.submission_id is not None:
        raise ConfigError("--period makes the job's name, and --submission-id gives it: leave one of them out.")
    with packed(config, Path.cwd(), submission.ship) as (folder, shipped):
        environment = runtime_env(folder, submission.env, submission.runtime_env)
        client = connected(address)
        job, found = _name(client, config, submission)
        entrypoint = shlex.join([submission.executable, submission.command, CONFIG, "--run-id", job])
        if found is None:
            try:
                client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job,
                    runtime_env=environment,
                    metadata={"period": submission.period} if submission.period is not None else {},
                )
            except RuntimeError as error:
                found = outcome(client, job) if submission.period is not None else None  # another was faster
                if found is None:
                    raise _not_accepted(error) from error
            except OSError as error:
                raise DpoRayError(
                    f"The cluster was lost while the job {job} was handed to it ({short(str(error))}). Whether it has "
                    f"it, `dpo-ray job status {pasted(client, job)}` tells once the cluster answers."
                ) from error
    _tell(client, job, found, shipped)
    if not wait:
        return 0
    return follow(client, job) if found is None or not found.ended else found.exit_code()


def _not_accepted(error: RuntimeError) -> DpoRayError:
    if _TAKEN in str(error):
        return ConfigError(
            f"The job was not accepted: {short(str(error))} A submission id is used once; to run again, leave "
            "--submission-id out or name another."
        )
    return DpoRayError(
        f"The job was not accepted: {short(str(error))} A head that is still starting, or has too much to do, may "
        "accept it in a minute; `ray status` there tells how it is."
    )


def _name(client: JobSubmissionClient, config: Config, submission: Submission) -> tuple[str, Outcome | None]:
    """The job's submission id, and what is known of that job where it is there already and is not to run anew."""
    if submission.period is None:
        return submission.submission_id or f"dpo-ray-{uuid.uuid4().hex[:10]}", None
    work = json.dumps([submission.command, config.model_dump(mode="json")], sort_keys=True)
    stem = f"{config.run.name}-{submission.period}-{hashlib.sha256(work.encode()).hexdigest()[:8]}"
    for attempt in range(1, _MOST_ATTEMPTS):
        name = stem if attempt == 1 else f"{stem}-{attempt}"
        found = outcome(client, name)
        if found is None or not found.failed:
            return name, found
    raise ConfigError(
        f"The period {submission.period} has failed {_MOST_ATTEMPTS - 1} times on this cluster. Look why with `dpo-ray "
        f"job logs {pasted(client, name)}`, and submit it without --period when its cause is mended."
    )


def _tell(client: JobSubmissionClient, job: str, found: Outcome | None, shipped: Sequence[str]) -> None:
    of_it = pasted(client, job)
    if found is None:
        carried = f", and with it {', '.join(shipped)}" if shipped else ""
        said = f"Submitted {job}{carried}."
    else:
        said = f"{job} is of this period and this configuration, and {found.status}: it is not run twice."
    sys.stderr.write(
        f"{said} `dpo-ray job logs {of_it} --follow` shows its log, `dpo-ray job cancel {of_it}` ends it.\n"
    )
