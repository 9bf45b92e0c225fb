"""The policy as a training starts with it, on each worker: a whole copy, or its own part of a sharded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpo_ray.config import Model, Train
from dpo_ray.errors import ConfigError, DpoRayError
from dpo_ray.model.part import Part, put_whole
from dpo_ray.model.policy import (
    CompletionScorer,
    compile_layers,
    load_part_of_policy,
    load_untried_policy,
    torch_dtype,
    use_packed_attention,
)
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.training.parallel import Rank, forget_gathered, gathered_objects, parallelize, part_of


def start_policy(
    folder: ModelFolder, model: Model, options: Train, me: Rank, *, seed: int
) -> tuple[CompletionScorer, nn.Module]:
    """Load it on every worker. Returns the scorer, and what is called for gradients to flow through it.

    Under train.strategy=fsdp no worker ever holds the model: it is built without weights and sharded, and each worker
    reads its own part. Weights that are not held in float32 are brought to what they are held in one by one, as they
    are read. Whether the model runs on packed pairs is tried as it will be computed: on this device, in this dtype, and
    sharded where it is.

    Raises ConfigError as load_untried_policy and parallelize do.
    """
    dtype = torch_dtype(model.dtype)
    how: dict[str, Any] = {
        "trust_remote_code": folder.trust_remote_code,
        "lora": model.lora,
        "seed": seed,
        "activation_checkpointing": options.recomputes_every,
        "activation_offload": options.activation_offload,
    }
    held_in = held_dtype(model, options)
    replicated, weights = options.strategy == "ddp", None
    if replicated and held_in == torch.float32 and model.quantization is None:
        scorer = CompletionScorer(load_untried_policy(folder.path, **how)).to(me.device)
    else:
        part = Part(0, 1) if replicated else part_of(me, options.sharding)
        found = load_part_of_policy(folder.path, part, dtype=held_in, **how)
        scorer = CompletionScorer(found.model)
        if replicated:
            put_whole(scorer.model, found.weights, me.device)
            scorer.to(me.device)
        else:
            weights = found.weights
    scorer.train()
    if options.compile:
        compile_layers(scorer.model)
    forward = parallelize(
        scorer, options.strategy, me, dtype, sharding=options.sharding, offload=options.offload, weights=weights
    )
    use_packed_attention(scorer, me.device, dtype)
    forget_gathered(forward)
    return scorer, forward


def fetch(folder: ModelFolder, me: Rank) -> None:
    """Have the model's files on this rank's node, before ranks wait for each other in what they compute.

    Raises on every rank alike what one of them has met: the others would wait for it for half an hour.
    """
    mine: DpoRayError | None = None
    try:
        _ = folder.path
    except DpoRayError as error:
        mine = error
    told = gathered_objects(str(mine) if mine is not None else "", me)
    if mine is not None:
        raise mine
    if failures := [found for found in told if found]:
        raise ConfigError(
            f"A worker cannot have the model's files, and others wait for it: {failures[0]} Have every node see the "
            "model, or name a place that all of them reach."
        )


def held_dtype(model: Model, options: Train) -> torch.dtype:
    """What the model's weights are held in, but those that are quantized: frozen ones in what they are computed in,
    trained ones in float32 where the optimizer does not say otherwise."""
    return torch_dtype(model.dtype) if model.lora is not None or options.in_bfloat16 else torch.float32
