"""A file of tensors in the format safetensors, written tensor by tensor: the library's own writer wants all of them.

The format: the length of the header in 8 bytes, little-endian; the header, JSON with dtype, shape and place of each
tensor; the tensors, row by row, little-endian (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_RANKS = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
"""The library has wide dtypes first, so that each tensor lies at a multiple of its width."""
_AT_ONCE = 16 * 2**20  # bytes


def num_bytes(tensor: Tensor) -> int:
    """Of its values."""
    return tensor.numel() * tensor.element_size()


@dataclass
class SafetensorsFile:
    """A file whose tensors are known, and can be written in any order."""

    _stream: BinaryIO
    _begins: dict[str, int]

    @classmethod
    @contextmanager
    def create(cls, path: Path, likes: Mapping[str, Tensor]) -> Iterator[SafetensorsFile]:
        """likes: name → a tensor of that shape and dtype, which may be on the meta device."""
        names = sorted(likes, key=lambda name: (-_RANKS.index(_DTYPES[likes[name].dtype]), name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begins, end = {}, 0
        for name in names:
            begins[name], end = end, end + num_bytes(likes[name])
            header[name] = {
                "dtype": _DTYPES[likes[name].dtype],
                "shape": list(likes[name].shape),
                "data_offsets": [begins[name], end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            first = stream.tell()
            stream.truncate(first + end)
            yield cls(stream, {name: first + begin for name, begin in begins.items()})

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor, which is on the CPU, in its place."""
        self._stream.seek(self._begins[name])
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for some in flat.split(_AT_ONCE):
            self._stream.write(memoryview(some.numpy()))

    def close(self) -> None:
        """Nothing more is written."""
        self._stream.close()
