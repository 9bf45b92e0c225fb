"""Errors on their way from a worker to the driver.

What a worker of Ray Data raises reaches the driver as text only. So a worker gives its error back as a value, ours with
its type and so its exit code, any other as the text of its traceback.
"""

from __future__ import annotations

import pickle
import traceback
from typing import NoReturn

from dpo_ray.errors import DpoRayError
from dpo_ray.origin import innermost


class WorkerError(Exception):
    """An exception of a worker that is none of ours: the text of its traceback."""


def carried(error: Exception) -> bytes:
    """An error as a value of a worker; restored by unpickling it. The traceback travels along."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, DpoRayError):
        return pickle.dumps(WorkerError(text))
    error.add_note(f"\nOn the worker:\n{text}")
    return pickle.dumps(error)


def raise_ours(error: BaseException, stage: str) -> NoReturn:
    """Re-raise the error of ours that Ray carries, or a readable DpoRayError where there is none."""
    ours = _find(error, set())
    if ours is error:
        raise error
    if ours is not None:
        raise ours from error
    text = str(error)
    if "\n  File " not in text:
        text = "".join(traceback.format_exception(error))
    raise DpoRayError(
        f"The stage {stage} failed on Ray: {innermost(text)}. What is finished is kept: the same command goes on from "
        "there. DPO_RAY_TRACEBACK=1 shows the whole traceback; the workers' logs are in /tmp/ray/session_latest/logs."
    ) from error


def reason_of(error: BaseException) -> str:
    """What an error that Ray carries says: ours as it is, of any other its kind, its message and its place."""
    ours = _find(error, set())
    return str(ours) if ours is not None else innermost(str(error))


def _find(error: BaseException | None, seen: set[int]) -> DpoRayError | None:
    if error is None or id(error) in seen:
        return None
    seen.add(id(error))
    # Ray gives what a task raised a class that is also the cause's, and as its text the traceback.
    cause = getattr(error, "cause", None)
    if isinstance(error, DpoRayError) and not isinstance(cause, DpoRayError):
        return error
    inside = [cause, error.__cause__, error.__context__, getattr(error, "controller_failure", None)]
    inside += list((getattr(error, "worker_failures", None) or {}).values())
    return next((found for e in inside if isinstance(e, BaseException) and (found := _find(e, seen))), None)
