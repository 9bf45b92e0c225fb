"""A small file that is replaced only where it still is what the writer last saw of it (compare and swap).

In an object store by its conditional writes: a PUT with If-None-Match or If-Match, which S3, Google Cloud Storage and
Azure Blob have; pyarrow's filesystems do not offer them. In a folder under a lock of the file (flock), which Linux
keeps between machines too on NFS and on cluster file systems, and which the kernel gives back when its holder dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow.fs as pafs

from dpo_ray.errors import ConfigError, StorageError
from dpo_ray.storage.location import ENDPOINTS, Location

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_SCHEMES = {"s3", "gs", "gcs", "az", "abfs", "abfss"}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class Seen:
    """What a file held, and as which version."""

    content: bytes
    version: Any


class ConditionalFile(Protocol):
    """A file with compare and swap. What the store refuses raises StorageError."""

    def read(self) -> Seen | None:
        """None where there is no file."""

    def swap(self, seen: Seen | None, content: bytes) -> Seen | None:
        """Write where the file still is as it was seen (None: absent). Returns what it is now, None where it was not.

        A reply that is lost on the way can make a write that succeeded look like one that did not: who writes content
        that is its own alone can tell by reading.
        """


def conditional_file(location: Location) -> ConditionalFile:
    """The file at a location. Raises ConfigError where its kind of storage has no conditional writes."""
    if location.is_local:
        return _LockedFile(Path(location.uri))
    scheme = location.uri.partition("://")[0]
    if scheme == "file":
        return _LockedFile(Path(location.filesystem()[1]))
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"{location} lies in a {scheme}:// storage, and there two runs cannot be kept apart. Let run.output be a "
            "local or shared folder, or a bucket as in s3://bucket/folder or gs://bucket/folder."
        )
    return _StoredFile(location)


@dataclass(frozen=True)
class _LockedFile:
    """Written in place under its lock: with the lock come the present bytes, also to a machine that has cached some.

    Content is small and written by one call; a power cut may still leave a part of it, which a reader must bear.
    """

    path: Path

    def read(self) -> Seen | None:
        try:
            with self._locked(os.O_RDWR) as file:
                content = _content(file)
        except FileNotFoundError:
            return None
        return Seen(content, content) if content else None

    def swap(self, seen: Seen | None, content: bytes) -> Seen | None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(os.O_RDWR | os.O_CREAT) as file:
            if _content(file) != (seen.content if seen is not None else b""):
                return None
            os.pwrite(file, content, 0)
            os.ftruncate(file, len(content))
            os.fsync(file)
        return Seen(content, content)

    @contextmanager
    def _locked(self, flags: int) -> Iterator[int]:
        try:
            file = os.open(self.path, flags, 0o666)
        except PermissionError as error:
            raise StorageError(
                f"{self.path} may not be written by this user ({error.strerror}), as a run has to. "
                "Give this user write access to it, or choose another run.output."
            ) from error
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise StorageError(
                    f"The file system of {self.path.parent} has no file locks ({error.strerror}), and without them two "
                    "runs there cannot be kept apart. Mount it with them (flock), or choose another run.output."
                ) from error
            yield file
        finally:
            os.close(file)


def _content(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


class _StoredFile:
    """An object."""

    def __init__(self, location: Location) -> None:
        self.location = location
        # Of the bucket alone: a path is no URL, and may hold # and %.
        root, self._name = location.in_bucket()
        self._store = _object_store(Location(root))

    def read(self) -> Seen | None:
        import obstore

        with self._asked():
            try:
                found = obstore.get(self._store, self._name)
                content = bytes(found.bytes())
            except FileNotFoundError:
                return None
            meta = found.meta
        return Seen(content, _version(meta))

    def swap(self, seen: Seen | None, content: bytes) -> Seen | None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._asked():
            try:
                put = obstore.put(self._store, self._name, content, mode="create" if seen is None else seen.version)
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                return None
        return Seen(content, _version(put))

    @contextmanager
    def _asked(self) -> Iterator[None]:
        from obstore.exceptions import BaseError

        with self.location.asked():
            try:
                yield
            except BaseError as error:
                raise OSError(str(error).partition("\n\nDebug source:")[0]) from error


def _version(described: Mapping[str, Any]) -> dict[str, str]:
    """What a conditional write is to compare: the ETag or, on Google Cloud Storage, the generation."""
    return {name: described[name] for name in ("e_tag", "version") if described.get(name) is not None}


def _object_store(folder: Location) -> ObjectStore:
    """The store with pyarrow's region and endpoint; credentials are the environment's or the machine's role."""
    from obstore.store import from_url

    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    fs, _ = folder.filesystem()
    config: dict[str, Any] = {}
    client: dict[str, Any] = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(seconds=20)}
    if isinstance(fs, pafs.S3FileSystem):
        config["region"] = fs.region
        if endpoint is not None:
            config["endpoint"] = endpoint
            client["allow_http"] = endpoint.startswith("http://")
    options: dict[str, Any] = {
        "config": config or None,
        "client_options": client,
        "retry_config": {"max_retries": 4, "retry_timeout": timedelta(seconds=30)},
    }
    store: ObjectStore = from_url(folder.uri, **options)
    return store
