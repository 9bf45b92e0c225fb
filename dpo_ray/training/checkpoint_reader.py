"""Reading the format of torch.distributed.checkpoint from where it lies, without running what a file may bring.

Each rank fetches what it needs, and nothing else. The format keeps its index, and each value that is no tensor, as a
pickle, and torch unpickles both without a limit.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from dpo_ray.errors import StorageError
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

    Refuses an index of anything but plain descriptions of tensors, with pickle.UnpicklingError.
    """

    def __init__(self, checkpoint: Location) -> None:
        super().__init__(checkpoint.uri)
        self._checkpoint = checkpoint
        self.fs = _Store(checkpoint)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found: Metadata = _Unpickler(io.BytesIO((self._checkpoint / _INDEX).read_bytes())).load()
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def _slice_file(self, file: pa.NativeFile, sinfo: Any) -> IO[bytes]:
        """A tensor's bytes in one request, where torch would make one for each of its small reads."""
        data = file.read_at(sinfo.length, sinfo.offset)
        if len(data) != sinfo.length:
            raise StorageError(
                f"{self._checkpoint / sinfo.relative_path} ends before its byte {sinfo.offset + sinfo.length}: the "
                "checkpoint is damaged. Remove its folder; the training goes on from the one before it."
            )
        return io.BytesIO(data)


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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"The index of a checkpoint names {module}.{name}, which has no place in one.")
