"""What a training run needs to go on exactly where it stopped.

Every rank writes a folder of its own and all folders are merged into one checkpoint: each holds the tensors that
its rank is to write, in the format of torch.distributed.checkpoint. That format names tensors and their places in
the whole, so a checkpoint can be resumed by another number of workers, and under DDP what FSDP wrote and the
other way round. Only trained parameters are in it: for LoRA, the adapter.
"""

from __future__ import annotations

import io
import json
import random
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dpo_ray.errors import ConfigError, DamagedCheckpoint
from dpo_ray.storage.location import Location
from dpo_ray.training.checkpoint_reader import Planner, Reader
from dpo_ray.training.files import HISTORY, STATE, read_history
from dpo_ray.training.optim import WeightAverage
from dpo_ray.training.parallel import Rank, gathered_objects, trained_state

_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


@dataclass
class TrainState:
    """Where the loop is: all that is not a tensor."""

    next_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of every logged step."""
    reward_sum: float = 0.0
    """Of the rewards of chosen and rejected over all steps so far, for losses that track their mean."""
    reward_count: float = 0.0
    finished: bool = False
    """Whether this is the end: the last step, or an early stop."""
    layout: str = ""
    """How pairs are computed: `shared`, with the layers that share nothing, or `padded`."""
    exported_step: int = 0
    """At the end, the step whose weights are exported."""


def save_checkpoint(
    folder: Path,
    *,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    state: TrainState,
    me: Rank,
) -> None:
    """Write this rank's part; every rank must call it. The parts together are the checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks that one process without a group is alone, which is meant
        dcp.save(_tensors(policy, optimizer, average), checkpoint_id=folder, no_dist=not dist.is_initialized())
    torch.save(_random_state(), folder / f"random-{me.rank}.pt")
    if me.rank == 0:
        (folder / HISTORY).write_text("".join(json.dumps(m, allow_nan=False) + "\n" for m in state.history))
    written = gathered_objects({f.name: f.stat().st_size for f in folder.iterdir()}, me)
    if me.rank == 0:
        record = {k: v for k, v in vars(state).items() if k != "history"}
        record["files"] = {name: size for part in written for name, size in part.items()}
        (folder / STATE).write_text(json.dumps(record, allow_nan=False))


def load_checkpoint(
    checkpoint: Location,
    *,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    me: Rank,
) -> TrainState:
    """Restore in place, whatever the number of workers and the wrapping were when it was written.

    Each rank reads its own part, from where the checkpoint lies. Raises DamagedCheckpoint on every rank alike where one
    of them reads tensors that are not those that were written; ConfigError where moments of 8 bits cannot be divided
    among this number of workers.
    """
    tensors = _tensors(policy, optimizer, average)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _load(tensors, checkpoint)
    set_model_state_dict(policy, tensors["model"], options=_TRAINED)
    set_optimizer_state_dict(policy, optimizer, tensors["optimizer"], options=_TRAINED)
    with suppress(FileNotFoundError):  # a rank that the run did not have before starts from its seed
        mine = io.BytesIO((checkpoint / f"random-{me.rank}.pt").read_bytes())
        _set_random_state(torch.load(mine, map_location="cpu", weights_only=True))
    record = json.loads((checkpoint / STATE).read_bytes())
    del record["files"]
    return TrainState(**record, history=read_history(checkpoint))


def _load(tensors: dict[str, Any], checkpoint: Location) -> None:
    """Read them in place. Raises as load_checkpoint does."""
    reader = Reader(checkpoint)
    try:
        reader.require_index()
        dcp.load(tensors, storage_reader=reader, planner=Planner(), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise _damage(error, checkpoint) or _other_blocks(error, checkpoint) or error from error
    except DamagedCheckpoint as error:
        error.folder = checkpoint.uri
        raise


def _damage(failed: CheckpointException, checkpoint: Location) -> DamagedCheckpoint | None:
    """What a rank has found, of which torch tells all of them; None where it is something else."""
    for error, _ in failed.failures.values():
        if isinstance(error, DamagedCheckpoint):
            found = error
        elif isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error):  # torch's, of a header of its own
            found = DamagedCheckpoint(f"{checkpoint} is damaged: {str(error).splitlines()[0]}")
        else:
            continue
        found.folder = checkpoint.uri
        return found
    return None


def _other_blocks(failed: CheckpointException, checkpoint: Location) -> ConfigError | None:
    """What a rank has found whose part of moments of 8 bits begins or ends within a block."""
    if not any(
        isinstance(error, ValueError) and "block boundary" in str(error) for error, _ in failed.failures.values()
    ):
        return None
    return ConfigError(
        f"{checkpoint} holds moments of 8 bits in blocks that cannot be divided as this number of workers wants them: "
        "go on with as many workers, and train.strategy and train.sharding, as it was written with; or train anew, in "
        "another run.output."
    )


def load_weights(checkpoint: Location, *, policy: nn.Module, average: WeightAverage | None) -> None:
    """Only the weights of a checkpoint, in place: what was evaluated at its step. Raises DamagedCheckpoint as
    load_checkpoint does."""
    tensors: dict[str, Any] = {"model": trained_state(policy, _TRAINED)}
    if average is not None:
        tensors["average"] = average.named_values()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _load(tensors, checkpoint)
    set_model_state_dict(policy, tensors["model"], options=_TRAINED)


def _tensors(policy: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None) -> dict[str, Any]:
    fresh = not optimizer.state
    tensors: dict[str, Any] = {
        "model": trained_state(policy, _TRAINED),
        "optimizer": get_optimizer_state_dict(policy, optimizer, options=_TRAINED),
    }
    if fresh:  # torch has filled it in by a step without gradients, which is to count for none
        for values in optimizer.state.values():
            values["step"].zero_()
    if average is not None:
        tensors["average"] = average.named_values()
    return tensors


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])
