"""The policy as a training starts with it, on each worker: a whole copy, or its own part of a sharded one."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpo_ray.config import Model, Train
from dpo_ray.model.policy import (
    CompletionScorer,
    compile_layers,
    load_part_of_policy,
    load_untried_policy,
    torch_dtype,
    use_packed_attention,
)
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.training.parallel import Rank, forget_gathered, parallelize, part_of


def start_policy(
    folder: ModelFolder, model: Model, options: Train, me: Rank, *, seed: int
) -> tuple[CompletionScorer, nn.Module]:
    """Load it on every worker. Returns the scorer, and what is called for gradients to flow through it.

    Under train.strategy=fsdp no worker ever holds the model: it is built without weights and sharded, and each worker
    reads its own part. Whether the model runs on packed pairs is tried as it will be computed: on this device, in this
    dtype, and sharded where it is.

    Raises ConfigError as load_untried_policy and parallelize do.
    """
    dtype = torch_dtype(model.dtype)
    how: dict[str, Any] = {
        "trust_remote_code": folder.trust_remote_code,
        "lora": model.lora,
        "seed": seed,
        "activation_checkpointing": options.activation_checkpointing,
    }
    weights = None
    if options.strategy == "fsdp":
        found = load_part_of_policy(folder.path, part_of(me, options.sharding), **how)
        scorer, weights = CompletionScorer(found.model), found.weights
    else:
        scorer = CompletionScorer(load_untried_policy(folder.path, **how)).to(me.device)
    scorer.train()
    if options.compile:
        compile_layers(scorer.model)
    forward = parallelize(scorer, options.strategy, me, dtype, sharding=options.sharding, weights=weights)
    use_packed_attention(scorer, me.device, dtype)
    forget_gathered(forward)
    return scorer, forward
