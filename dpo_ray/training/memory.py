"""How many tokens a training worker can compute at once, from the model's shape and the worker's memory.

An estimate, made before training: what is kept for the backward pass was counted on Llama, Qwen and Gemma layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpo_ray.config import Model, Train
from dpo_ray.errors import ConfigError
from dpo_ray.model.logprobs import TILE_TOKENS
from dpo_ray.model.resolve import ModelFolder

MOST_TOKENS_CPU = 1024  # matrix products are no faster with more rows, and memory that is not taken costs nothing
MOST_TOKENS_GPU = 16384

_USABLE = 0.8  # of the memory; the rest is for the allocator's gaps, communication and what else runs there
_HIDDEN_PER_LAYER = 18  # values of hidden size and of intermediate size that a layer keeps for each token
_INTERMEDIATE_PER_LAYER = 4
_LOGIT_TILES = 3 * TILE_TOKENS * 4  # bytes for each vocabulary entry: three tiles in float32
_GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """What of a model takes memory."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    """Of all experts that a token goes through."""
    vocabulary: int


def shape_of(folder: ModelFolder) -> Shape:
    """Read off a model folder's configuration; no weights are loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = AutoConfig.from_pretrained(folder.description, trust_remote_code=folder.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole, trust_remote_code=folder.trust_remote_code)
    config = whole.get_text_config()
    hidden = config.hidden_size
    experts = getattr(config, "num_experts_per_tok", None) or 1
    width = getattr(config, "moe_intermediate_size", None) if experts > 1 else None
    width = width or getattr(config, "intermediate_size", None) or 4 * hidden
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=experts * width,
        vocabulary=config.vocab_size,
    )


def state_bytes(shape: Shape, model: Model, train: Train, num_workers: int) -> int:
    """Weights, gradients and AdamW's moments on one worker, and the computing copy in bfloat16."""
    whole = 4 if model.lora is not None else 16  # adapters themselves are small beside it
    copy = 2 if model.dtype == "bfloat16" else 0
    sharded = num_workers if train.strategy == "fsdp" else 1
    return shape.parameters * whole // sharded + shape.parameters * copy // sharded


def bytes_per_token(shape: Shape, model: Model, train: Train) -> int:
    """What the backward pass needs of each token of a micro-batch."""
    size = 2 if model.dtype == "bfloat16" else 4
    layer = size * (_HIDDEN_PER_LAYER * shape.hidden + _INTERMEDIATE_PER_LAYER * shape.intermediate)
    if train.activation_checkpointing:
        return layer + shape.layers * size * shape.hidden
    return shape.layers * layer


def tokens_that_fit(shape: Shape, model: Model, train: Train, *, memory: int, num_workers: int) -> int:
    """Tokens of a micro-batch on a worker with `memory` bytes.

    Raises ConfigError where the model's own state leaves no room for a useful number of them.
    """
    state = state_bytes(shape, model, train, num_workers)
    room = _USABLE * memory - state - _LOGIT_TILES * shape.vocabulary
    tokens = int(room // bytes_per_token(shape, model, train))
    if tokens < 128:
        raise ConfigError(
            f"train.tokens_per_microbatch=auto finds no room: a worker has {memory / _GIB:.1f} GiB, of which weights, "
            f"gradients and optimizer take about {state / _GIB:.1f}. Use train.strategy=fsdp with more workers, "
            "model.dtype=bfloat16, model.lora or train.activation_checkpointing; or set train.tokens_per_microbatch "
            "to a number, if you know that it fits."
        )
    return min(tokens, MOST_TOKENS_GPU if train.use_gpu else MOST_TOKENS_CPU)


def tokens_on_a_worker(model: Model, train: Train, num_workers: int) -> int:
    """Tokens of a micro-batch on a worker like the process that asks. Raises ConfigError."""
    shape = shape_of(ModelFolder.of(model))
    memory = worker_memory(num_workers, train.cpus_per_worker, train.gpus)
    return tokens_that_fit(shape, model, train, memory=memory, num_workers=num_workers)


def worker_memory(num_workers: int, cpus_per_worker: float, gpus: float) -> int:
    """Bytes of one worker where this runs: its GPU's, or its part of the machine's memory.

    All of the memory, free or not, so that a run that is gone on with is cut into micro-batches as before.
    """
    if gpus:
        import torch

        return int(gpus * torch.cuda.mem_get_info()[1])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    beside = max(1, min(num_workers, int((os.cpu_count() or 1) // cpus_per_worker)))
    return total // beside
