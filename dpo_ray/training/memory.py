"""How many tokens a training worker can compute at once, from the model's shape and the worker's memory.

An estimate, made before training: what is kept for the backward pass was counted on Llama, Qwen and Gemma layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpo_ray.config import LoRA, Model, Train
from dpo_ray.errors import ConfigError
from dpo_ray.model import attention
from dpo_ray.model.logprobs import TILE_TOKENS
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TokenizedPair

MOST_TOKENS_CPU = 2048  # matrix products are no faster with more rows, and gradients are added up less often with these
MOST_TOKENS_GPU = 16384

SMALLEST_IN_8_BITS = 4096
"""Values of a weight whose moments torchao does not leave in the weight's own dtype."""
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
    heads: int
    """Of queries in a layer's attention."""
    outside: int
    """Parameters that are in no decoder layer: embedding, head, the last norm."""
    tied: bool
    """Whether embedding and head are one."""
    linear: int = 0
    """Parameters of linear layers in decoder layers: what model.lora.quantization is about."""
    sides: int = 0
    """Rows and columns of these, added up: what adapters have for each rank."""

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer."""
        return (self.parameters - self.outside) // max(1, self.layers)


def shape_of(folder: ModelFolder) -> Shape:
    """Read off a model folder's configuration; no weights are loaded."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = AutoConfig.from_pretrained(folder.description, trust_remote_code=folder.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole, trust_remote_code=folder.trust_remote_code)
    config = whole.get_text_config()
    hidden = config.hidden_size
    experts = getattr(config, "num_experts_per_tok", None) or 1
    width = getattr(config, "moe_intermediate_size", None) if experts > 1 else None
    width = width or getattr(config, "intermediate_size", None) or 4 * hidden
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    linear = [module.weight.shape for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=experts * width,
        vocabulary=config.vocab_size,
        heads=config.num_attention_heads,
        outside=sum(p.numel() for p in model.parameters() if id(p) not in inside),
        tied=model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        linear=sum(rows * columns for rows, columns in linear),
        sides=sum(rows + columns for rows, columns in linear),
    )


def trained_parameters(folder: ModelFolder, lora: LoRA | None) -> int:
    """How many parameters are trained: those of the adapters, or all. No weights are loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder.description, trust_remote_code=folder.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=folder.trust_remote_code)
        if lora is not None:
            from dpo_ray.model.lora import add_adapters

            add_adapters(model, lora)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def checkpoint_bytes(trained: int, train: Train) -> int:
    """Of a checkpoint of so many trained parameters: weights, AdamW's two moments, and the weights' average."""
    each = (2 if train.in_bfloat16 else 4) * (1 + (train.ema_decay is not None))
    return int(trained * (each + moment_bytes(train)))


def moment_bytes(train: Train) -> float:
    """Of AdamW's two moments of a weight. In 8 bits, 256 of them have a scale in float32."""
    return {"adamw": 8.0, "adamw_bf16": 6.0}.get(train.optimizer, 2 * (1 + 4 / 256))


def frozen_bytes(shape: Shape, model: Model) -> float:
    """Of all of a model's weights as they are held under adapters."""
    size = 2 if model.dtype == "bfloat16" else 4
    of_linear = {"nf4": 0.5 + 4 / 64, "int8": 1 + 4 / shape.hidden}.get(model.quantization or "", float(size))
    return shape.linear * of_linear + (shape.parameters - shape.linear) * size


@dataclass(frozen=True)
class State:
    """Bytes of what one worker holds between two steps and within them."""

    weights: int
    gradients: int
    moments: int
    """AdamW's."""
    average: int
    """The weights' moving average."""
    beside: int
    """Of replicas: what gradients travel in, and the computing copy in bfloat16 of weights in float32."""
    on_host: bool
    """Whether all of it lies in the host's memory, and not on the device."""

    @property
    def all(self) -> int:
        return self.weights + self.gradients + self.moments + self.average + self.beside


def state_of(shape: Shape, model: Model, train: Train, num_workers: int) -> State:
    """By the model's shape. Adapters are counted as if all linear layers had some."""
    shards = _shards(train, num_workers) if train.strategy == "fsdp" else 1
    trained = shape.parameters if model.lora is None else model.lora.rank * shape.sides
    frozen = frozen_bytes(shape, model) if model.lora is not None else 0.0
    size = 2 if train.in_bfloat16 else 4
    moments = moment_bytes(train)
    if model.lora is not None and model.lora.rank * shape.hidden < SMALLEST_IN_8_BITS:
        moments = 8.0
    # Replicas add gradients up in the float32 that they travel in, until the last micro-batch.
    gradient = 4 if num_workers > shards else size
    beside = 0
    by_torch_ddp = model.dtype == "float32" or not (train.use_gpu or train.in_bfloat16)
    if train.strategy == "ddp" and by_torch_ddp and num_workers > 1:
        beside = 4 * trained  # DistributedDataParallel's buckets
    if train.strategy == "ddp" and model.dtype == "bfloat16" and not train.in_bfloat16:
        beside += 2 * trained
    return State(
        weights=int((frozen + size * trained) / shards),
        gradients=gradient * trained // shards,
        moments=int(moments * trained / shards),
        average=size * trained // shards if train.ema_decay is not None else 0,
        beside=beside,
        on_host=train.offload,
    )


def state_bytes(shape: Shape, model: Model, train: Train, num_workers: int) -> int:
    """What of a worker's state lies where it computes: all of it, or nothing."""
    state = state_of(shape, model, train, num_workers)
    return 0 if state.on_host else state.all


def _shards(train: Train, num_workers: int) -> int:
    return train.sharding.workers or num_workers


def gathered_bytes(shape: Shape, model: Model, train: Train, num_workers: int) -> int:
    """What a worker of a sharded model holds for a moment beside its part: weights that are gathered, in the dtype that
    is computed in; their gradients in it, and in the float32 that these travel in.

    Of a layer and of the next one on its way; or of embedding or head, whichever is more. Nothing for replicas, but for
    those whose weights are in bfloat16, which have a copy of a layer while it computes. Measured:
    benchmarks/sharding.md.
    """
    if train.strategy != "fsdp" and not train.in_bfloat16:
        return 0
    size = 2 if model.dtype == "bfloat16" else 4
    trained = model.lora is None
    layer, end = shape.layer, shape.vocabulary * shape.hidden
    kept = shape.parameters if train.sharding.keep_gathered else 0
    ahead = 1 + train.sharding.prefetch_layers if train.strategy == "fsdp" and _shards(train, num_workers) > 1 else 0
    if not trained and model.quantization is not None:  # packed as they are gathered; one matrix at a time is whole
        each = shape.linear / max(1, shape.layers)
        layer = int(layer * frozen_bytes(shape, model) / (size * shape.parameters))
        kept = int(kept * frozen_bytes(shape, model) / (size * shape.parameters))
        of_layers = int(size * layer * (1 + ahead) + size * each / 2)
    else:
        of_layers = size * layer * (1 + ahead) + (size + 4) * layer * trained
    if shape.tied:  # gathered all the time, and its gradient waits for the embedding's
        of_layers += size * end * (1 + trained)
    of_ends = size * end * 2 if not trained else (2 * size + 4) * end
    return size * kept + max(of_layers, of_ends)


def bytes_per_token(shape: Shape, model: Model, train: Train) -> int:
    """What the backward pass needs of each token of a micro-batch."""
    size = 2 if model.dtype == "bfloat16" else 4
    layer = size * (_HIDDEN_PER_LAYER * shape.hidden + _INTERMEDIATE_PER_LAYER * shape.intermediate)
    again = recomputed_layers(shape.layers, train)
    begins = 0 if train.activation_offload else size * shape.hidden
    return (shape.layers - again + (again > 0)) * layer + again * begins


def recomputed_layers(layers: int, train: Train) -> int:
    """How many of them compute their activations again in the backward pass, one after the other."""
    return -(-layers // train.recomputes_every) if train.recomputes_every else 0


def tokens_that_fit(shape: Shape, model: Model, train: Train, *, memory: int, num_workers: int) -> int:
    """Tokens of a micro-batch on a worker with `memory` bytes.

    Raises ConfigError where the model's own state leaves no room for a useful number of them.
    """
    room = room_beside_state(shape, model, train, memory=memory, num_workers=num_workers)
    tokens = int(room // bytes_per_token(shape, model, train))
    if tokens < 128:
        state = state_bytes(shape, model, train, num_workers) + gathered_bytes(shape, model, train, num_workers)
        raise ConfigError(
            f"train.tokens_per_microbatch=auto finds no room: a worker has {memory / _GIB:.1f} GiB, of which weights, "
            f"gradients and optimizer take about {state / _GIB:.1f}. Use train.strategy=fsdp with more workers, "
            "model.dtype=bfloat16, train.optimizer=adamw_8bit, model.lora or train.activation_checkpointing; or set "
            "train.tokens_per_microbatch to a number, if you know that it fits."
        )
    return min(tokens, MOST_TOKENS_GPU if train.use_gpu else MOST_TOKENS_CPU)


def room_beside_state(shape: Shape, model: Model, train: Train, *, memory: int, num_workers: int) -> float:
    """Bytes of a worker with `memory` bytes that are left for micro-batches; below 0 where not even the state fits."""
    held = state_bytes(shape, model, train, num_workers) + gathered_bytes(shape, model, train, num_workers)
    return _USABLE * memory - held - _LOGIT_TILES * shape.vocabulary


def pair_bytes(
    shape: Shape,
    model: Model,
    train: Train,
    pair: TokenizedPair,
    implementation: str,
    *,
    window: int | None = None,
    stepwise: bool = False,
) -> int:
    """What the backward pass needs of a pair that is computed alone on a CPU.

    Beside what every token needs, attention keeps in each layer what grows with the square of the sequence: the mask,
    as PyTorch's kernel for CPUs converts it; the weights of all heads where it is computed step by step. The packed
    attention makes its mask anew in each layer's backward pass, so that there is one at a time.

    Args:
        implementation: of attention, as transformers names it.
        window: of layers with a sliding window, if there are any.
        stepwise: whether the packed attention has soft caps or sinks, and so holds all its weights.
    """
    size = 2 if model.dtype == "bfloat16" else 4
    prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
    if implementation == attention.IMPLEMENTATION:
        # Rejected has a mask always, which a window makes smaller; chosen has one where there is a window.
        seen = prompt if window is None else min(prompt, window - 1)
        tokens, squares = pair.num_tokens, rejected * (seen + rejected)
        if window is not None or stepwise:
            squares = (prompt + chosen) ** 2 + rejected * ((prompt if stepwise else seen) + rejected)
    else:
        width = prompt + max(chosen, rejected)
        rows = bool(chosen) + bool(rejected)
        tokens, squares = rows * width, rows * width**2
    square = size
    if implementation == attention.IMPLEMENTATION and stepwise:
        square = shape.heads * (4 + size)
    if implementation == "eager":
        square = shape.heads * (4 if size == 4 else 4 + size)  # a softmax is in float32, and brought to bfloat16 then
    again = recomputed_layers(shape.layers, train)
    layers = shape.layers - again + (again > 0)
    if implementation == attention.IMPLEMENTATION and not stepwise:
        layers = square = 1  # of bool
    return tokens * bytes_per_token(shape, model, train) + layers * squares * square


def worker_memory(beside: int, gpus: float) -> int:
    """Bytes of one worker where this runs: its GPU's, or its part of the machine's memory.

    All of the memory, free or not, so that a run that is gone on with is cut into micro-batches as before.

    Args:
        beside: workers that share the machine, this one included.
        gpus: of one worker; 0 on CPU.
    """
    if gpus:
        import torch

        return int(gpus * torch.cuda.mem_get_info()[1])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total // beside
