"""What the command line says last where it ends by an error: one paragraph, and the exit code."""

from __future__ import annotations

import errno
import os
import traceback

from dpo_ray.errors import DpoRayError

SAID = "The log with all that was said is"
"""How the note begins that an error gets."""

_ROOM = (
    "free some space there or name another run.output. `dpo-ray gc OUTPUT` lists what of a run.output nothing needs; "
    "temporary files go where TMPDIR says."
)
_RIGHTS = "let this user write there, or name another run.output."
_OF_THE_DISK = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
}
"""What to do about errors that are no defect of ours, by their number."""


def last_words(error: Exception) -> tuple[str, int]:
    """A paragraph on an error, and the exit code."""
    if isinstance(error, DpoRayError):
        return f"{type(error).__name__}: {error}{_log_of(error)}", error.exit_code
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        place = error.filename or "what was to be written"
        return (
            f"{os.strerror(error.errno)}: {place}. What is finished is kept, and the same command goes on from "
            f"there once this is mended: {_OF_THE_DISK[error.errno]}{_log_of(error)}"
        ), 1
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"Unexpected {type(error).__name__}: {error} ({last.filename}:{last.lineno}). What is finished is kept. "
        "Set DPO_RAY_TRACEBACK=1 for the whole traceback; this is a defect worth reporting."
        f"{_log_of(error)}"
    ), 1


def wanted_traceback(error: Exception) -> str:
    """Where it is asked for, the whole traceback, the worker's included; the paragraph still ends the output."""
    return "".join(traceback.format_exception(error)) if os.environ.get("DPO_RAY_TRACEBACK") else ""


def _log_of(error: BaseException) -> str:
    """Where more was said, if it was. Other notes, as of a worker's traceback, belong to the traceback."""
    return "".join(f" {note}" for note in getattr(error, "__notes__", []) if note.startswith(SAID))
