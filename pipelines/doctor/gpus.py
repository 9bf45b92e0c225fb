"""The GPUs of a machine: whether the driver answers, PyTorch can use them, and vLLM finds room on them."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_ray.config import Config
from dpo_ray.machine import Machine
from pipelines.doctor.asked import uses_vllm, wants_gpus
from pipelines.doctor.lines import Found

_GIB = 2**30


def gpus(config: Config, found: Machine, where: str) -> Iterator[Found]:
    """What stands in the way of using them, or that nothing does.

    Args:
        where: what the machine is called.
    """
    vllm, wanted = config.vllm, wants_gpus(config)
    if found.no_driver is not None:
        yield (
            "failed" if wanted else "warning",
            f"{where}: the driver of its GPUs does not answer ({found.no_driver}). Restart the machine or install "
            "the driver anew; in a container, start it with access to the GPUs.",
        )
    elif found.gpus and found.torch_cuda is None:
        yield (
            "failed" if wanted else "warning",
            f"{where} has {_named(found)}, but its PyTorch {found.versions.get('torch', '')} is a build for CPUs. "
            "Install the CUDA build of the same version.",
        )
    elif found.gpus and found.torch_gpus == 0:
        yield (
            "failed" if wanted else "warning",
            f"{where} has {_named(found)} with driver {found.gpus[0].driver}, but its PyTorch, built for CUDA "
            f"{found.torch_cuda}, can use none of them: most often the driver is older than that CUDA asks for. "
            "Update the driver, install a PyTorch for an older CUDA, or look at CUDA_VISIBLE_DEVICES.",
        )
    elif wanted and not found.gpus:
        yield (
            "failed",
            f"{where} has no GPU, and the configuration asks for some (train.use_gpu, vllm.gpus_per_actor). Run on "
            "a cluster that has them (RAY_ADDRESS), or set train.use_gpu=false and vllm.gpus_per_actor=0.",
        )
    elif found.gpus:
        yield (
            "ok" if wanted else "warning",
            f"{where} has {_named(found)}, driver {found.gpus[0].driver}, of which PyTorch uses {found.torch_gpus}"
            + ("" if wanted else "; the configuration uses none: set train.use_gpu, vllm.gpus_per_actor"),
        )
    else:
        yield "ok", f"{where} has no GPU, and none is asked for"
    for number, gpu in enumerate(found.gpus):
        if not wanted or gpu.memory is None or gpu.used is None:
            continue
        free = 1 - gpu.used / gpu.memory
        if uses_vllm(config) and vllm.gpus_per_actor and free < vllm.gpu_memory_utilization:
            yield (
                "failed",
                f"{where}: of GPU {number} ({gpu.name}) others hold {gpu.used / _GIB:.1f} of "
                f"{gpu.memory / _GIB:.1f} GiB now, and vLLM refuses to start where less than "
                f"vllm.gpu_memory_utilization={vllm.gpu_memory_utilization:g} is free. End what holds it (nvidia-smi "
                "names the processes), or lower that option.",
            )


def _named(found: Machine) -> str:
    return f"{len(found.gpus)} × {found.gpus[0].name}"
