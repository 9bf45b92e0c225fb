"""One path type for local folders and object stores.

A file appears under its name complete or not at all: locally it is written beside its place and renamed; an object
store makes an object visible only when its upload ends, so there the whole content is sent by one call.
"""

from __future__ import annotations

import builtins
import fnmatch
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from dpo_ray.errors import ConfigError, StorageError
from dpo_ray.storage.hub import SCHEME, HubPath, fetched, hub_files, is_hub_place

_CHUNK = 16 << 20
_READS = 10
_LARGEST_SERVER_COPY = 5 << 30  # what S3 copies by one request
# How the errors of the stores' own libraries read; what decompresses or parses a file raises OSError too.
_STORES_WORDS = ("AWS Error", "curlCode", "google::cloud::Status")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


@dataclass(frozen=True)
class Location:
    """A place below a local folder or an URI that pyarrow.fs knows (s3://…, gs://…); or, to be read, a file of a data
    set of the hub (hf://datasets/…).

    What an object store refuses raises StorageError, except for a missing file: FileNotFoundError, as locally.
    """

    uri: str

    @classmethod
    def of(cls, path: str | Path) -> Location:
        """Build from a URI or a local path; local paths become absolute, for Ray workers change folder.

        Raises ConfigError on a URI with credentials or options in it, which would end up in logs and manifests.
        """
        text = str(path)
        if "://" not in text:
            return cls(str(Path(text).expanduser().absolute()))
        parts = urlsplit(text)
        if parts.password is not None or (parts.username is not None and parts.scheme in {"s3", "gs"}):
            raise ConfigError(
                f"The {parts.scheme}:// path below {parts.hostname} holds credentials, and paths are written into logs "
                "and reports. Take them out of it, and give them in the environment (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY) or by the machine's role."
            )
        if parts.query or "?" in text:
            raise ConfigError(
                f"{text} holds a question mark, after which object stores expect options. Give region and endpoint in "
                "the environment (AWS_REGION, AWS_ENDPOINT_URL), and use * or […] in a pattern."
            )
        return cls(text.rstrip("/"))

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        """The folder that it lies in."""
        return Location(self.uri.rpartition("/")[0])

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def is_of_commit(self) -> bool:
        """Whether it is a file of the hub, which never changes."""
        return self.uri.startswith(SCHEME)

    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """The pyarrow filesystem, made once in a process, and the path inside it. Raises ConfigError.

        A file of the hub is downloaded here; DataError is raised where that fails.
        """
        if self.is_local:
            return pafs.LocalFileSystem(), self.uri
        if self.is_of_commit:
            return pafs.LocalFileSystem(), fetched(self.uri)
        root, inside = self.in_bucket()
        fs, base = _filesystem(root)
        return fs, f"{base}/{inside}" if inside else base

    def same_store(self, path: str) -> Location:
        """The place of a path inside this one's filesystem."""
        if self.is_local:
            return Location(path)
        root, _ = self.in_bucket()
        return Location(root + "/" + path.removeprefix(_filesystem(root)[1]).lstrip("/"))

    def in_bucket(self) -> tuple[str, str]:
        """scheme://bucket, and the rest."""
        scheme, _, rest = self.uri.partition("://")
        bucket, _, inside = rest.partition("/")
        return f"{scheme}://{bucket}", inside

    def read_bytes(self) -> bytes:
        """The whole of a file. Raises FileNotFoundError."""
        fs, path = self.filesystem()
        with self.asked():
            for attempt in range(1, _READS + 1):
                try:
                    with fs.open_input_file(path) as file:
                        data: bytes = file.read()
                except FileNotFoundError:
                    raise
                except OSError:
                    # A server may break off a response whose object is replaced meanwhile.
                    if self.is_local or attempt == _READS:
                        raise
                    continue
                # An object that is replaced between the request for its size and that for its bytes comes cut off.
                if self.is_local or len(data) == self.size():
                    return data
            raise OSError(f"it was replaced during each of {_READS} attempts to read it")

    def read_chunks(self) -> Iterator[bytes]:
        """The bytes of a file of any size, piece by piece. Raises FileNotFoundError."""
        fs, path = self.filesystem()
        with self.asked(), fs.open_input_file(path) as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def write_bytes(self, data: bytes | pa.Buffer) -> None:
        """Write atomically: readers see the old content or the new one, never a part."""
        if self.is_local:
            with _replacing(Path(self.uri)) as stream:
                stream.write(data)
            return
        fs, path = self.filesystem()
        # pyarrow cannot give an upload up: whatever was written to a stream becomes an object when the stream is closed
        # or collected, after an exception too (apache/arrow#40502). So everything goes in by one call, whose failure it
        # remembers, and on a thread of its own, where no interrupt can come before it.
        with self.asked(), ThreadPoolExecutor(1) as thread:
            thread.submit(_upload, fs, path, data).result()

    def exists(self) -> bool:
        """Whether there is a file or a folder. Without anything in it, a folder of an object store may be none."""
        fs, path = self.filesystem()
        with self.asked():
            return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)

    def size(self) -> int:
        """Bytes of the file. Raises FileNotFoundError."""
        fs, path = self.filesystem()
        with self.asked():
            info = fs.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise FileNotFoundError(str(self))
        return info.size or 0

    def written(self) -> float | None:
        """When the file was written, by the store's own time, in seconds since the epoch; None where there is none."""
        fs, path = self.filesystem()
        with self.asked():
            info = fs.get_file_info(path)
        return None if info.type == pafs.FileType.NotFound else (info.mtime_ns or 0) / 1e9

    def files(self, *, recursive: bool = True) -> list[pafs.FileInfo]:
        """What is known of the files below this folder, by path, asked for in few requests; empty without a folder.

        same_store(info.path) is the place of one.
        """
        infos = self._infos(recursive=recursive)
        return sorted((info for info in infos if info.type == pafs.FileType.File), key=lambda info: info.path)

    def _infos(self, *, recursive: bool) -> list[pafs.FileInfo]:
        fs, path = self.filesystem()
        with self.asked():
            selected = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
            infos: list[pafs.FileInfo] = fs.get_file_info(selected)
            return infos

    def folders(self) -> dict[str, float | None]:
        """Names of the folders in this one, and when something was last written right in each, in seconds since the
        epoch: None in an object store, where folders have no time."""
        infos = sorted(self._infos(recursive=False), key=lambda info: info.base_name)
        found = [info for info in infos if info.type == pafs.FileType.Directory and not info.base_name.startswith(".")]
        return {info.base_name: info.mtime_ns / 1e9 if info.mtime_ns is not None else None for info in found}

    def children(self) -> list[Location]:
        """Children by name; empty where there is no such folder. Unfinished files are not listed."""
        names = sorted(info.base_name for info in self._infos(recursive=False))
        return [self / name for name in names if not name.startswith(".")]

    def copy_to(self, target: Location) -> None:
        """Copy one file, whatever its size; the target appears complete or not at all. Raises FileNotFoundError."""
        if target.is_local:
            self._download(Path(target.uri))
        elif self.is_local:
            with pa.memory_map(self.uri) as content:
                target.write_bytes(content.read_buffer())
        else:
            (fs, path), (to, to_path) = self.filesystem(), target.filesystem()
            if fs.equals(to) and self.size() <= _LARGEST_SERVER_COPY:
                with self.asked():
                    fs.copy_file(path, to_path)
                return
            with tempfile.TemporaryDirectory(prefix="dpo-ray-copy-") as scratch:
                between = Location(f"{scratch}/{self.name}")
                self.copy_to(between)
                between.copy_to(target)

    def _download(self, target: Path) -> None:
        fs, path = self.filesystem()
        with self.asked(), fs.open_input_file(path) as source, _replacing(target) as out:
            shutil.copyfileobj(source, out, _CHUNK)
            if out.tell() != source.size():
                raise OSError(f"{out.tell()} of {source.size()} bytes came")

    def copy_folder_to(self, target: Location) -> None:
        """Copy a folder with all that is in it, file by file; unfinished files, whose names begin with a dot, stay."""
        for name in self.names():
            (self / name).copy_to(target / name)

    def names(self) -> builtins.list[str]:
        """Paths below this folder of all files in it, by name; unfinished ones, which begin with a dot, left out."""
        found = [self.same_store(info.path).uri.removeprefix(f"{self.uri}/") for info in self.files()]
        return [name for name in found if not any(part.startswith(".") for part in name.split("/"))]

    def remove(self) -> None:
        """Remove one file; it need not be there."""
        fs, path = self.filesystem()
        with suppress(FileNotFoundError), self.asked():
            fs.delete_file(path)

    def remove_folder(self) -> None:
        """Remove a folder with all that is in it; without a folder, nothing."""
        fs, path = self.filesystem()
        if self.exists():
            with suppress(FileNotFoundError), self.asked():  # another process may remove it too
                fs.delete_dir(path)

    def raise_for_store(self, error: BaseException) -> None:
        """Raise StorageError where an error is the object store's own, and not one of what is in the file."""
        if not self.is_local and isinstance(error, OSError) and any(words in str(error) for words in _STORES_WORDS):
            with self.asked():
                raise error

    def require_writable(self) -> None:
        """Raises ConfigError where a small file cannot be written and removed."""
        probe = self / f"write-probe-{uuid.uuid4().hex[:8]}"
        try:
            probe.write_bytes(b"")
            fs, path = probe.filesystem()
            fs.delete_file(path)
        except OSError as error:
            reason = error.__cause__ if isinstance(error, StorageError) else error
            raise ConfigError(
                f"run.output is {self}, but nothing can be written there ({reason}). Choose another folder with "
                "-o run.output=…, or give this user write access to it."
            ) from error

    @contextmanager
    def asked(self) -> Iterator[None]:
        """What goes wrong in an object store as an error that says where and what to look at."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if self.is_local or isinstance(error, StorageError):
                raise
            endpoint = next((f"{n}={os.environ[n]}" for n in ENDPOINTS if os.environ.get(n)), "the store's own")
            raise StorageError(
                f"{self} could not be read or written: {' '.join(str(error).split())} Check the bucket's name, the "
                f"network, the endpoint ({endpoint}) and the credentials in the environment of this machine and of the "
                "Ray workers. What is finished is kept: the same command goes on from there."
            ) from error


def find_files(pattern: str, suffix: str | tuple[str, ...]) -> list[Location]:
    """The files that a path names: a file itself, the files with such a suffix (in small letters, meant in either) in a
    folder, or the matches of a glob.
    A local file that is called so is that file, also where its name could be a pattern (pairs[1].jsonl).

    The path is local, in an object store, or on the hub (hf://datasets/…, or owner/name where there is no such folder
    here), which is asked once in a process. In a folder, files and folders whose names begin with a dot or an
    underscore are no data (unfinished writes, caches, _SUCCESS). Sorted by name, empty where nothing is found. Raises
    DataError where the hub does not give a data set.
    """
    if is_hub_place(pattern):
        return _find_on_hub(HubPath.of(pattern), suffix)
    place = Location.of(pattern)
    wild = "*?[" if place.is_local else "*["
    if any(c in pattern for c in wild) and not (place.is_local and os.path.isfile(place.uri)):
        if place.is_local:
            return [Location(p) for p in sorted(glob.glob(place.uri, recursive=True)) if Path(p).is_file()]
        root, _, _ = place.uri[: min(i for c in wild if (i := place.uri.find(c)) >= 0)].rpartition("/")
        parts = place.uri.split("/")
        deeper = "/" in place.uri.removeprefix(f"{root}/")
        below = [place.same_store(f.path) for f in Location(root).files(recursive=deeper)]
        return [f for f in below if _matches(f.uri.split("/"), parts)]
    fs, path = place.filesystem()
    with place.asked():
        kind = fs.get_file_info(path).type
    if kind == pafs.FileType.File:
        return [place]
    if kind == pafs.FileType.Directory:
        inside = [(place.same_store(f.path), f.path[len(path) :].split("/")) for f in place.files()]
        return [
            f
            for f, parts in inside
            if f.uri.lower().endswith(suffix) and not any(p.startswith((".", "_")) for p in parts)
        ]
    return []


def _find_on_hub(place: HubPath, suffix: str | tuple[str, ...]) -> list[Location]:
    files = hub_files(place)
    if place.path in files:
        return [Location(files[place.path])]
    if any(c in place.path for c in "*["):
        pattern = place.path.split("/")
        return [Location(files[name]) for name in sorted(files) if _matches(name.split("/"), pattern)]
    folder = f"{place.path}/" if place.path else ""
    inside = [name for name in sorted(files) if name.startswith(folder) and name.lower().endswith(suffix)]
    hidden = (".", "_")
    return [Location(files[name]) for name in inside if not any(p.startswith(hidden) for p in name.split("/"))]


def _matches(path: list[str], pattern: list[str]) -> bool:
    """Segment by segment, as in a shell: only ** crosses a slash."""
    if not path or not pattern:
        return not path and not pattern
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


@lru_cache(maxsize=64)
def _filesystem(root: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of scheme://bucket and the bucket's path in it."""
    try:
        fs, base = pafs.FileSystem.from_uri(f"{root}/")
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"{root} is no place that can be read or written ({error}). Name a local folder, or a bucket as in "
            "s3://bucket/folder or gs://bucket/folder."
        ) from error
    if isinstance(fs, pafs.S3FileSystem):
        # from_uri finds the region, but it waits for a few seconds only, and makes three requests for a small file.
        fs = pafs.S3FileSystem(
            region=fs.region,
            endpoint_override=next((os.environ[n] for n in ENDPOINTS if os.environ.get(n)), None),
            connect_timeout=10,
            request_timeout=60,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=6),
            allow_delayed_open=True,
        )
    return fs, base.rstrip("/")


def _upload(fs: pafs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
    with fs.open_output_stream(path, compression=None) as stream:
        stream.write(data)


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A file to fill, which takes the target's place when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
