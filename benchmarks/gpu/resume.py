"""A training in bfloat16 that goes on from its checkpoint, against the one that was not interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.scale import Scale, write_model
from benchmarks.gpu.steps import learner_of, pairs_of
from dpo_ray.storage.location import Location
from dpo_ray.training.batch import Share
from dpo_ray.training.checkpoint import load_checkpoint, save_checkpoint
from dpo_ray.training.parallel import Rank, whole_state
from dpo_ray.training.step import Learner

_STEPS = 4


def bit_for_bit(scale: Scale, folder: Path) -> list[dict[str, Any]]:
    """After two steps a checkpoint is written; another process's policy and optimizer are read from it, and both go on.

    What was read must be what was written, bit for bit, and so must the loss of the next step, whose forward pass adds
    up in a fixed order. Further ones may differ by what the backward pass adds up in no fixed order. A row.
    """
    model = write_model(folder / "small", scale.small)
    me = Rank(0, 1, scale.device)
    pairs = pairs_of(scale, _STEPS * scale.pairs_per_step, scale.small["vocab_size"])
    batches = [pairs[n * scale.pairs_per_step : (n + 1) * scale.pairs_per_step] for n in range(_STEPS)]
    first = learner_of(scale, model, "bfloat16")
    for batch in batches[:2]:
        _step(first, batch)
    checkpoint = folder / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir()
    arguments = {"policy": first.scorer.model, "optimizer": first.optimizer, "average": None, "me": me}
    save_checkpoint(checkpoint, state=first.state, **arguments)
    written = {name: value.clone() for name, value in whole_state(first.scorer.model).items()}
    going_on = [_step(first, batch) for batch in batches[2:]]

    other = learner_of(scale, model, "bfloat16")
    load_checkpoint(Location.of(checkpoint), policy=other.scorer.model, optimizer=other.optimizer, average=None, me=me)
    read = whole_state(other.scorer.model)
    different = [name for name, value in written.items() if not torch.equal(value, read[name])]
    resumed = [_step(other, batch) for batch in batches[2:]]
    row = {
        "tensors": len(written),
        "read otherwise": len(different),
        "loss of the next step": going_on[0],
        "resumed": resumed[0],
        "|Δ| of the one after": abs(going_on[1] - resumed[1]),
    }
    if different or resumed[0] != going_on[0]:
        raise AssertionError(f"a resumed training is another one: {row}, {different[:3]}")
    return [row]


def _step(learner: Learner, batch: list[Any]) -> float:
    return learner.step(Share([batch], batch[0]), 1e-4, None).metrics["loss"]
