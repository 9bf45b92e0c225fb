"""Libraries of the extra `memory`, by which weights and moments take fewer bytes: whether they are installed."""

from __future__ import annotations

from importlib.util import find_spec

from dpo_ray.config import Optimizer, Quantization
from dpo_ray.errors import ConfigError


def require_bitsandbytes(quantization: Quantization | None) -> None:
    """Raises ConfigError where it is needed and not installed."""
    if quantization is not None:
        _require("bitsandbytes", f"model.lora.quantization={quantization}")


def require_torchao(optimizer: Optimizer) -> None:
    """Raises ConfigError where it is needed and not installed."""
    if optimizer != "adamw":
        _require("torchao", f"train.optimizer={optimizer}")


def _require(module: str, asked_by: str) -> None:
    if find_spec(module) is None:
        raise ConfigError(
            f"{asked_by} needs {module}, which is not installed: pip install 'dpo-ray[memory]', or leave "
            f"{asked_by.partition('=')[0]} out."
        )
