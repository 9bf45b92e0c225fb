"""Reading the format of torch.distributed.checkpoint from where it lies, without running what a file may bring.

Each rank fetches what it needs, and nothing else. The format keeps its index, and each value that is no tensor, as a
pickle, and torch unpickles both without a limit. Every tensor and every value is a zip file with the CRC-32 of what is
in it, at which torch does not look when it reads.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from dpo_ray.errors import DamagedCheckpoint
from dpo_ray.storage.location import Location

_INDEX = ".metadata"
_PLAIN = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}
"""What the index is made of, apart from torch's dtypes."""


class Reader(FileSystemReader):
    """Reads a checkpoint in a local folder or in an object store: a request for each tensor that is wanted.

    Refuses an index of anything but plain descriptions of tensors, with pickle.UnpicklingError; and bytes that are not
    those that were written, with DamagedCheckpoint.
    """

    def __init__(self, checkpoint: Location) -> None:
        super().__init__(checkpoint.uri)
        self._checkpoint = checkpoint
        self.fs = _Store(checkpoint)
        self._index: Metadata | None = None

    def require_index(self) -> None:
        """Read it. Where this is left to torch, whatever goes wrong becomes an AssertionError of a few words."""
        data = (self._checkpoint / _INDEX).read_bytes()
        try:
            self._index = _Unpickler(io.BytesIO(data)).load()
        except _Refused:
            raise
        except Exception as error:  # whatever a pickle with other bytes ends in
            what = self._checkpoint / _INDEX
            raise DamagedCheckpoint(f"{what} is damaged ({type(error).__name__}: {error}).") from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self.require_index()
        found = self._index
        assert found is not None
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def _slice_file(self, file: pa.NativeFile, sinfo: Any) -> IO[bytes]:
        """A tensor's bytes in one request, where torch would make one for each of its small reads."""
        data = file.read_at(sinfo.length, sinfo.offset)
        place = self._checkpoint / sinfo.relative_path
        if len(data) != sinfo.length:
            raise DamagedCheckpoint(f"{place} ends before its byte {sinfo.offset + sinfo.length}.")
        require_sound(data, f"{place}, from byte {sinfo.offset} on")
        return io.BytesIO(data)


def require_sound(saved: bytes, what: str) -> None:
    """Raises DamagedCheckpoint where what torch.save has written is not as it was written."""
    try:
        with zipfile.ZipFile(io.BytesIO(saved)) as file:
            wrong = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise DamagedCheckpoint(f"{what}, is damaged: {error}.") from error
    if wrong is not None:
        raise DamagedCheckpoint(f"{what}, is damaged: the CRC-32 of {wrong} is another one.")


class _Store(FileSystem):
    """What torch's reader asks of a file system, of the folder of a checkpoint."""

    def __init__(self, checkpoint: Location) -> None:
        super().__init__()
        self._checkpoint = checkpoint

    def concat_path(self, path: Any, suffix: str) -> str:
        return suffix

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[pa.NativeFile]:
        file = self._checkpoint / str(path)
        fs, inside = file.filesystem()
        with file.asked(), fs.open_input_file(inside) as stream:
            yield stream


class Planner(DefaultLoadPlanner):
    """Refuses values that are more than plain data, with pickle.UnpicklingError."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class _Refused(pickle.UnpicklingError):
    """A pickle that brings more than plain data."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise _Refused(f"The index of a checkpoint names {module}.{name}, which has no place in one.")
