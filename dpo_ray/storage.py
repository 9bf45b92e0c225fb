"""One path type for local folders and object stores.

A file appears under its name complete or not at all: locally it is written beside its place and renamed;
an object store makes an object visible only when its upload ends, so there it is written in place.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from dpo_ray.errors import ConfigError


@dataclass(frozen=True)
class Location:
    """A place below a local folder or an URI that pyarrow.fs knows (s3://…, gs://…)."""

    uri: str

    @classmethod
    def of(cls, path: str | Path) -> Location:
        """Build from a URI or a local path; local paths become absolute, for Ray workers change folder."""
        text = str(path)
        return cls(text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute()))

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """The pyarrow filesystem and the path inside it."""
        if self.is_local:
            return pafs.LocalFileSystem(), self.uri
        return pafs.FileSystem.from_uri(self.uri)

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError."""
        fs, path = self.filesystem()
        with fs.open_input_stream(path) as stream:
            return stream.read()

    def write_bytes(self, data: bytes) -> None:
        """Write atomically: readers see the old content or the new one, never a part."""
        fs, path = self.filesystem()
        if not self.is_local:
            with fs.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def exists(self) -> bool:
        fs, path = self.filesystem()
        return fs.get_file_info(path).type != pafs.FileType.NotFound

    def size(self) -> int:
        """Bytes of the file. Raises FileNotFoundError."""
        fs, path = self.filesystem()
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise FileNotFoundError(str(self))
        return info.size or 0

    def list(self) -> list[Location]:
        """Children by name; empty where there is no such folder. Unfinished files are not listed."""
        fs, path = self.filesystem()
        found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        names = sorted(info.base_name for info in found)
        return [self / name for name in names if not name.startswith(".")]

    def remove(self) -> None:
        """Remove one file; it need not be there."""
        fs, path = self.filesystem()
        with contextlib.suppress(FileNotFoundError):
            fs.delete_file(path)

    def copy_to(self, target: Location) -> None:
        """Copy one file; the target appears complete or not at all."""
        target.write_bytes(self.read_bytes())

    def require_writable(self) -> None:
        """Raises ConfigError where a small file cannot be written and removed."""
        probe = self / f"write-probe-{uuid.uuid4().hex[:8]}"
        try:
            probe.write_bytes(b"")
            fs, path = probe.filesystem()
            fs.delete_file(path)
        except OSError as error:
            raise ConfigError(
                f"run.output is {self}, but nothing can be written there ({error}). Choose another folder with "
                "-o run.output=…, or give this user write access to it."
            ) from error


def find_files(pattern: str, suffix: str | tuple[str, ...]) -> list[Location]:
    """The files that a path names: a file itself, the files with such a suffix in a folder, or the matches of a glob.

    In a folder, files and folders whose names begin with a dot or an underscore are no data (unfinished writes, caches,
    _SUCCESS). Sorted by name, empty where nothing is found.
    """
    place = Location.of(pattern)
    # In a URI a question mark begins its options.
    wild = "*?[" if place.is_local else "*["
    if any(c in pattern for c in wild):
        if place.is_local:
            return [Location(p) for p in sorted(glob.glob(place.uri, recursive=True)) if Path(p).is_file()]
        root = place.uri[: min(i for c in wild if (i := place.uri.find(c)) >= 0)].rsplit("/", 1)[0]
        parts = place.uri.split("/")
        return [f for f in _files_below(Location(root)) if _matches(f.uri.split("/"), parts)]
    fs, path = place.filesystem()
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.File:
        return [place]
    if kind == pafs.FileType.Directory:
        below = [(f, f.uri[len(place.uri) :].split("/")) for f in _files_below(place)]
        return [f for f, parts in below if f.uri.endswith(suffix) and not any(p.startswith((".", "_")) for p in parts)]
    return []


def _matches(path: list[str], pattern: list[str]) -> bool:
    """Segment by segment, as in a shell: only ** crosses a slash."""
    if not path or not pattern:
        return not path and not pattern
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _files_below(folder: Location) -> list[Location]:
    fs, path = folder.filesystem()
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    prefix = folder.uri.removesuffix(path)
    return [Location(prefix + i.path) for i in sorted(found, key=lambda i: i.path) if i.type == pafs.FileType.File]
