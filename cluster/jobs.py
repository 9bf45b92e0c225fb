"""Jobs of dpo-ray on a Ray cluster, as seen from elsewhere: how they stand, their logs, their end."""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_ray.errors import ConfigError, DpoRayError, Interrupted
from dpo_ray.on_ray.authentication import WAY_IN, described
from dpo_ray.origin import short

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_SECONDS_TO_STOP = 60
_NOT_FOUND = "status code 404"  # Ray's client has no error of its own for it
_CONNECT_S, _ANSWER_S, _TAKE_S = 10.0, 60.0, 600.0
"""How long a dashboard may take: to be reached, to answer a question, and to take in what it is sent or told to do."""


@dataclass(frozen=True)
class Outcome:
    """How a job stands."""

    job: str
    status: str
    """In Ray's words: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    driver_exit_code: int | None
    """Of the job's own process: Ray's status and `ray job submit` know only whether it is 0."""
    start_seconds: float | None
    end_seconds: float | None
    """Both since the epoch; None: not yet."""

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in {"STOPPED", "SUCCEEDED", "FAILED"}

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than well."""
        return self.status in {"STOPPED", "FAILED"}

    def exit_code(self) -> int:
        """Raises DpoRayError where the job has none, as after it was stopped or its node was lost."""
        if self.status == "SUCCEEDED":
            return 0
        if self.driver_exit_code is None:
            raise DpoRayError(
                f"The job {self.job} is {self.status} and has no exit status: {self.message} What its stages had "
                "finished is kept: submit it again, and it goes on from there."
            )
        return self.driver_exit_code

    def told(self) -> str:
        """In one line."""
        # As runs and models are dated, wherever the job was started from.
        began, ended = (time.strftime("%FT%TZ", time.gmtime(s)) if s else "-" for s in self._times)
        code = "" if self.driver_exit_code is None else f", exit code {self.driver_exit_code}"
        return f"{self.job}: {self.status}{code}; began {began}, ended {ended}. {' '.join(self.message.split())}"

    @property
    def _times(self) -> tuple[float | None, float | None]:
        return self.start_seconds, self.end_seconds


def connected(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's dashboard. Raises ConfigError where none answers, or where it refuses us.

    Args:
        address: as in http://127.0.0.1:8265; None: where Ray looks, which is a Ray of this machine at last.
    """
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # ray is not typed
        given = address

        def _do_request(self, method: str, *args: Any, **kwargs: Any) -> Any:
            # Ray waits for ever, as behind a forwarded port whose other end is gone.
            wait = _ANSWER_S if method == "GET" else _TAKE_S
            return super()._do_request(method, *args, **{"timeout": (_CONNECT_S, wait), **kwargs})

    there = address or "the address that Ray finds"
    try:
        return Client(address)
    except AuthenticationError as error:
        raise ConfigError(f"The Ray dashboard at {there} does not let us in; here {described()}. {WAY_IN}") from error
    # Of requests' errors all are OSError: no connection, no answer in time, an error of a proxy, no JSON.
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, RayError) as error:
        bare = address is not None and "://" not in address
        scheme = f" Without http:// before it, Ray took {address} for the port by which nodes join." if bare else ""
        raise ConfigError(
            f"No Ray dashboard answers at {there} ({short(str(error))}).{scheme} Name the head's dashboard, as in "
            "--address http://127.0.0.1:8265 or by RAY_API_SERVER_ADDRESS; from outside a Kubernetes cluster, forward "
            "its port first."
        ) from error


def pasted(client: JobSubmissionClient, job: str) -> str:
    """A job on the cluster of this client, as `dpo-ray job` is told of it in a shell: names may have spaces."""
    address = getattr(client, "given", None)
    return shlex.quote(job) + (f" --address {shlex.quote(address)}" if address is not None else "")


def outcome(client: JobSubmissionClient, job: str) -> Outcome | None:
    """How a job stands; None where the cluster knows none of this name."""
    try:
        with _reached(client, job):
            info = client.get_job_info(job)
    except RuntimeError as error:
        if _NOT_FOUND in str(error):
            return None
        raise
    times = (None if value is None else value / 1000 for value in (info.start_time, info.end_time))
    return Outcome(job, str(info.status), info.message or "", info.driver_exit_code, *times)


def known(client: JobSubmissionClient, job: str) -> Outcome:
    """How a job stands. Raises ConfigError where the cluster knows none of this name."""
    found = outcome(client, job)
    if found is None:
        raise ConfigError(
            f"The cluster knows no job {job}. A head that was started again has forgotten its jobs; what they finished "
            "lies in their run.output, which `dpo-ray show` reads. `ray job list` names those that are known."
        )
    return found


def print_logs(client: JobSubmissionClient, job: str) -> None:
    """What it has said so far. Raises ConfigError where the cluster knows no such job."""
    known(client, job)
    with _reached(client, job):
        print(client.get_job_logs(job), end="", flush=True)


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print a job's log as it grows, to its end. Returns the exit status of its own process.

    Raises DpoRayError where it ended without one, or where the cluster is lost meanwhile; Interrupted by Ctrl-C, which
    leaves the job as it is.
    """
    known(client, job)
    try:
        with _reached(client, job):
            asyncio.run(_print_all(client, job))
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"The job {job} goes on. See its log again with `dpo-ray job logs {pasted(client, job)} --follow`, or end "
            f"it with `dpo-ray job cancel {pasted(client, job)}`."
        ) from error
    return _ended(client, job, _SECONDS_TO_STOP).exit_code()


def cancel(client: JobSubmissionClient, job: str) -> Outcome:
    """End a job that runs, and wait for it. Raises ConfigError where the cluster knows none of this name."""
    found = known(client, job)
    if found.ended:
        return found
    with _reached(client, job):
        client.stop_job(job)
    return _ended(client, job, _SECONDS_TO_STOP)


def _ended(client: JobSubmissionClient, job: str, seconds: float) -> Outcome:
    """A job's last state: the log's end comes shortly before it."""
    deadline = time.monotonic() + seconds
    while not (found := known(client, job)).ended:
        if time.monotonic() > deadline:
            raise DpoRayError(
                f"The job {job} is still {found.status} after {seconds:g} s. {found.message} Ask again how it stands "
                f"with `dpo-ray job status {pasted(client, job)}`, or end it with `dpo-ray job cancel "
                f"{pasted(client, job)}`."
            )
        time.sleep(0.5)
    return found


async def _print_all(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stdout.write(lines)
        sys.stdout.flush()


@contextmanager
def _reached(client: JobSubmissionClient, job: str) -> Iterator[None]:
    """Raises DpoRayError where the cluster does not answer any more."""
    try:
        yield
    except RuntimeError as error:
        if "status code" in str(error):  # it answered
            raise
        raise _lost(client, job, error) from error
    except OSError as error:
        raise _lost(client, job, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "aiohttp":
            raise
        raise _lost(client, job, error) from error


def _lost(client: JobSubmissionClient, job: str, error: Any) -> DpoRayError:
    return DpoRayError(
        f"The cluster was lost while the job {job} was watched ({short(str(error) or type(error).__name__)}). If its "
        f"head is there still, the job goes on: `dpo-ray job status {pasted(client, job)}`. If not, submit it again "
        "once there is one: what its stages had finished is taken over."
    )
