"""What a training run needs to go on exactly where it stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn

_STATE = "state.pt"
_MODEL = "model.safetensors"
_HISTORY = "metrics.jsonl"


def save_checkpoint(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, next_step: int, history: list[dict[str, Any]]
) -> None:
    """Write model, optimizer, random states, the metrics so far and the step to go on with."""
    save_model(model, str(folder / _MODEL))
    state = {
        "optimizer": optimizer.state_dict(),
        "next_step": next_step,
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy_rng": _plain(np.random.get_state()),
        "python_rng": random.getstate(),
    }
    torch.save(state, folder / _STATE)
    (folder / _HISTORY).write_text("".join(json.dumps(m) + "\n" for m in history))


def load_checkpoint(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, Any]]]:
    """Restore in place. Returns the step to go on with, and the metrics so far."""
    load_model(model, str(folder / _MODEL))
    state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    name, keys, *rest = state["numpy_rng"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python_rng"])
    return state["next_step"], read_history(folder)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The metrics of every logged step up to the checkpoint."""
    return [json.loads(line) for line in (folder / _HISTORY).read_text().splitlines()]


def _plain(numpy_state: Any) -> tuple[Any, ...]:
    name, keys, *rest = numpy_state
    return (name, keys.tolist(), *rest)
