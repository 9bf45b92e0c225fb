"""Whether a store does what a run asks of it: write, read, list, write conditionally, remove."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpo_ray.errors import ConfigError, StorageError
from dpo_ray.storage.conditional import ConditionalFile, conditional_file
from dpo_ray.storage.location import Location

_TICK = 1.0  # seconds: object stores round the times of objects


def try_out(output: Location) -> float:
    """Do it all below run.output, and leave nothing there.

    Returns the seconds by which the store's clock, which dates files, is ahead of this machine's at least; negative
    where it is behind, and 0 where that cannot be told from the time that a write takes.

    Raises ConfigError naming what the store does not do, StorageError where it does not answer.
    """
    made = _missing_folders(output)
    try:
        output.require_writable()
        return _round_trip(output, output / f"probe-{uuid.uuid4().hex[:8]}")
    finally:
        for folder in made:
            with suppress(OSError):  # another run has begun there
                folder.rmdir()


def _round_trip(output: Location, folder: Location) -> float:
    file, content = folder / "file", uuid.uuid4().bytes
    before = time.time()
    try:
        with _told(output, "written"):
            file.write_bytes(content)
        after = time.time()
        with _told(output, "read"):
            found = file.read_bytes()
        if found != content:
            raise ConfigError(
                f"Below run.output={output} a file has another content than was written ({len(found)} bytes for "
                f"{len(content)}): something between here and the store changes or caches it. Name another output."
            )
        with _told(output, "listed"):
            listed = [child.name for child in folder.children()]
        if listed != [file.name]:
            raise ConfigError(
                f"Below run.output={output} a folder does not list the file that was just written into it (it lists "
                f"{listed}). Stages find finished shards by listing: name an output that lists what was written."
            )
        written = file.written()
        with _told(output, "written conditionally"):
            _require_conditions(output, conditional_file(folder / "conditional"))
        with _told(output, "removed"):
            file.remove()
        if file.exists():
            raise ConfigError(
                f"Below run.output={output} a file is still there after it was removed. Give this user the right to "
                "delete (s3:DeleteObject), and turn off what retains objects in that folder."
            )
    finally:
        with suppress(OSError):  # what it cannot remove was told of
            folder.remove_folder()
    return _ahead(before, after, written)


def _require_conditions(output: Location, file: ConditionalFile) -> None:
    """Raises ConfigError where a write goes through whose condition does not hold, or is refused though it does."""
    first = file.swap(None, b"1")
    overwrites = file.swap(None, b"2") is not None
    second = file.swap(first, b"3") if first is not None and not overwrites else None
    overwrites |= first is not None and second is not None and file.swap(first, b"4") is not None
    if overwrites:
        raise ConfigError(
            f"The store of run.output={output} does not heed conditional writes (If-None-Match, If-Match): a file was "
            "written over that should have been spared. Leases would not keep two runs apart there. Use a store that "
            "has them, as S3, Google Cloud Storage and recent MinIO have, or a shared folder with file locks."
        )
    if first is None or second is None:
        raise ConfigError(
            f"The store of run.output={output} refuses a conditional write whose condition holds (If-None-Match, "
            "If-Match), so no lease can be taken there. Use a store that has them, as S3 and Google Cloud Storage "
            "have, or a shared folder with file locks."
        )


def _ahead(before: float, after: float, written: float | None) -> float:
    if written is None:
        return 0.0
    if written > after:
        return written - after
    return min(0.0, written + _TICK - before)


@contextmanager
def _told(output: Location, done: str) -> Iterator[None]:
    """What the file system or the store refuses, with what was tried."""
    try:
        yield
    except OSError as error:
        reason = error.__cause__ if isinstance(error, StorageError) and error.__cause__ else error
        raise ConfigError(
            f"Below run.output={output} a file could not be {done} ({' '.join(str(reason).split())}), as a run has to. "
            "Give this user the rights to read, write, list and delete there, or choose another folder with "
            "-o run.output=…."
        ) from error


def _missing_folders(output: Location) -> list[Path]:
    """Local folders that are made for it, the innermost first."""
    if not output.is_local:
        return []
    path = Path(output.uri)
    return [folder for folder in (path, *path.parents) if not folder.exists()]
