"""A file that is written tensor by tensor is the one that the library writes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from dpo_ray.model import safetensors_file
from dpo_ray.model.safetensors_file import SafetensorsFile


def test_it_is_the_librarys_own_byte_for_byte(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_AT_ONCE", 7)
    tensors = {f"{dtype}.ä.{n}": torch.ones(n, 3).to(dtype) for dtype in safetensors_file._DTYPES for n in (1, 2)}
    tensors |= {"turned": torch.randn(3, 5).T.bfloat16(), "scalar": torch.randn(()), "empty": torch.empty(0, 4)}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "whole", metadata={"format": "pt"})
    with SafetensorsFile.create(tmp_path / "parts", {n: t.to("meta") for n, t in tensors.items()}) as file:
        for name in sorted(tensors, reverse=True):
            file.write(name, tensors[name])
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
