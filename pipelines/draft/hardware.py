"""What the machine has that a configuration is chosen by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpo_ray.machine import told_by_driver, told_by_torch
from dpo_ray.on_ray.session import num_cores
from dpo_ray.on_ray.vllm_version import has_vllm
from dpo_ray.training.memory import worker_memory

_MOST_WORKERS_ON_CPU = 4
_GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """Of this machine."""

    cores: int
    memory: int
    """Bytes of the machine, or of its container."""
    gpus: int
    """That PyTorch can use."""
    gpu_memory: int | None
    """Bytes of the smallest of them; None where there is none, or the driver does not tell."""
    gpu_name: str | None
    vllm: bool
    """Whether vLLM is installed."""
    fast_bfloat16: bool = False
    """Whether the CPU has instructions for products in bfloat16: without them it is the slower dtype."""

    @classmethod
    def here(cls) -> Hardware:
        """What is found on this machine."""
        found, _ = told_by_driver()
        gpus = min(len(found), told_by_torch()[1]) if found else 0
        sizes = [gpu.memory for gpu in found[:gpus] if gpu.memory is not None]
        return cls(
            cores=num_cores(),
            memory=worker_memory(1, 0),
            gpus=gpus,
            gpu_memory=min(sizes, default=None),
            gpu_name=found[0].name if gpus else None,
            vllm=has_vllm(),
            fast_bfloat16=bool({"amx_bf16", "avx512_bf16"} & _capabilities()),
        )

    @property
    def most_workers(self) -> int:
        """Workers of a training: one a GPU; of a CPU, few with several cores each, for each holds a model."""
        return self.gpus or max(1, min(self.cores // 2, _MOST_WORKERS_ON_CPU))

    def of_worker(self, workers: int) -> int | None:
        """Bytes that one of so many workers has; None where nobody tells."""
        return self.gpu_memory if self.gpus else self.memory // workers

    def __str__(self) -> str:
        if self.gpus:
            size = f" of {self.gpu_memory / _GIB:.0f} GiB" if self.gpu_memory is not None else ""
            return f"{self.gpus} × {self.gpu_name}{size}, {self.cores} cores"
        return f"{self.cores} cores, {self.memory / _GIB:.0f} GiB, no GPU that PyTorch can use"


def _capabilities() -> set[str]:
    """What PyTorch finds that this CPU can do."""
    return {name for name, found in torch.cpu.get_capabilities().items() if found is True}
