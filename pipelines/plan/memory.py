"""Memory of a process of each kind, whether it fits, and what would make it fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dpo_ray.config import Config, LoRA
from dpo_ray.errors import ConfigError
from dpo_ray.model.logprobs import TILE_TOKENS
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.training.activations import counted_bytes_per_token
from dpo_ray.training.index import PlanIndex
from dpo_ray.training.memory import (
    MOST_TOKENS_CPU,
    MOST_TOKENS_GPU,
    Shape,
    State,
    bytes_per_token,
    gathered_bytes,
    room_beside_state,
    state_bytes,
    state_of,
    tokens_that_fit,
)
from dpo_ray.training.plan import StepPlan
from pipelines.plan.counts import Side

_GIB = 2**30
_WIDTH = {"float32": 4, "bfloat16": 2}
_MOST_WORKERS = 64
_STEPS = 200  # of a training that are packed, to see how large its micro-batches are


@dataclass(frozen=True)
class Memory:
    """Of one process."""

    bytes: int
    parts: str
    """What it is made up of."""
    has: int | None = None
    """Bytes that a process has there; None: nobody said."""
    lacking: str | None = None
    """What does not fit; None where it fits, or nobody knows."""
    knob: str | None = None
    """What would make it fit."""


def of_training(
    config: Config, shape: Shape, pairs: Side, index: PlanIndex | None, has: int | None, process: int
) -> Memory:
    """Of a worker.

    Args:
        index: of all pairs, where they are known: the largest micro-batch is then that of the training's own plan.
        has: bytes of a worker, where they are known.
        process: bytes of a process that has loaded the libraries, and no model.
    """
    train, model = config.train, config.model
    workers = train.min_workers or train.num_workers
    lacking = None
    limit: int
    if train.tokens_per_microbatch != "auto":
        limit = train.tokens_per_microbatch
        if has is not None and _room(config, shape, has) < bytes_per_token(shape, model, train) * pairs.longest:
            lacking = f"the longest pair, {pairs.longest} tokens, has no room beside weights, gradients and optimizer"
    elif has is None:
        limit = MOST_TOKENS_GPU if train.use_gpu else MOST_TOKENS_CPU
    else:
        try:
            limit = tokens_that_fit(shape, model, train, memory=has, num_workers=workers)
        except ConfigError as error:
            limit, lacking = 0, str(error)
    if index is not None:
        tokens = _largest_microbatch(config, shape, index, max(1, limit))
    else:  # a worker's share of a step may be less than a micro-batch may have
        share = math.ceil(train.global_batch_size / train.num_workers) * (pairs.tokens_once / max(1.0, pairs.pairs))
        tokens = max(pairs.longest, min(limit, math.ceil(share)))
    state = state_of(shape, model, train, workers)
    counted = counted_bytes_per_token(ModelFolder.of(model), model, train)
    batch = int(tokens * (counted if counted is not None else bytes_per_token(shape, model, train)))
    logits = 3 * TILE_TOKENS * 4 * shape.vocabulary
    gathered = gathered_bytes(shape, model, train, workers)
    of_others = f"gathered from other workers {gathered / _GIB:.2f} + " if gathered else ""
    parts = (
        f"{_told(state)} + {of_others}{tokens} tokens at once {batch / _GIB:.2f} "
        f"({'counted on two of its layers' if counted is not None else 'a bound by its shape'}) + logits "
        f"{logits / _GIB:.2f} + the process {process / _GIB:.2f} GiB"
    )
    knob = _knob(config, shape, pairs.longest, has) if lacking is not None and has is not None else None
    return Memory(
        state_bytes(shape, model, train, workers) + gathered + batch + logits + process, parts, has, lacking, knob
    )


def _told(state: State) -> str:
    average = f" + their average {state.average / _GIB:.2f}" if state.average else ""
    beside = f" + copies of them {state.beside / _GIB:.2f}" if state.beside else ""
    each = (
        f"weights {state.weights / _GIB:.2f} + gradients {state.gradients / _GIB:.2f} + moments "
        f"{state.moments / _GIB:.2f}{average}{beside}"
    )
    return f"(on the host {each})" if state.on_host else each


def of_scoring(config: Config, shape: Shape, process: int, *, by_vllm: bool, gpu: int | None) -> Memory:
    """Of an engine that scores or generates. gpu: bytes of a GPU, where it has one and they are known."""
    weights = shape.parameters * _WIDTH[config.model.dtype]
    if not by_vllm:
        logits = 3 * TILE_TOKENS * 4 * shape.vocabulary
        if gpu is not None and weights > 0.8 * gpu:  # as dpo_ray.model.for_scoring does
            weights = _WIDTH[config.model.dtype] * (shape.outside + shape.layer)
            what = f"embedding, head and one layer at a time {weights / _GIB:.2f}"
        else:
            what = f"weights {weights / _GIB:.2f}"
        parts = f"{what} + logits {logits / _GIB:.2f} + the process {process / _GIB:.2f} GiB"
        return Memory(weights + logits + process, parts, gpu)
    vllm = config.vllm
    if vllm.gpus_per_actor == 0:
        held = weights + vllm.kv_cache_gib * _GIB + _GIB
        parts = f"weights {weights / _GIB:.2f} + key-value cache {vllm.kv_cache_gib} + logits 1 GiB + the process"
        return Memory(held + process, f"{parts} {process / _GIB:.2f} GiB")
    each = weights // vllm.gpus_per_actor
    if gpu is None:
        return Memory(each, f"weights {each / _GIB:.2f} GiB on each GPU; the rest up to its share is cache")
    taken = int(vllm.gpu_memory_utilization * gpu)
    lacking = knob = None
    if each >= taken:
        lacking = f"the weights of {each / _GIB:.1f} GiB leave no room for a cache in {taken / _GIB:.1f} GiB"
        needed = math.ceil(weights / (0.8 * taken))
        knob = f"vllm.gpus_per_actor={1 << (needed - 1).bit_length()}"
    return Memory(taken, f"vllm.gpu_memory_utilization={vllm.gpu_memory_utilization:g} of a GPU", gpu, lacking, knob)


def resident(path: Path = Path("/proc/self/status")) -> int:
    """Bytes that this process holds; 0 where the system does not tell."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def _largest_microbatch(config: Config, shape: Shape, index: PlanIndex, limit: int) -> int:
    """Tokens, over the first steps of the training, and of the longest pair, which is tried before them."""
    train = config.train
    steps = StepPlan(
        index, train.global_batch_size, train.epochs, config.run.seed, shape.hidden, weights=config.data.weights
    )
    tokens = index.facts.longest_tokens
    for _, rows in itertools.islice(steps.steps(), _STEPS):
        for rank in steps.microbatches(rows, train.num_workers, limit):
            tokens = max(tokens, *(int(index.lengths[batch].sum()) for batch in rank))
    return tokens


def _room(config: Config, shape: Shape, has: int) -> float:
    workers = config.train.min_workers or config.train.num_workers
    return room_beside_state(shape, config.model, config.train, memory=has, num_workers=workers)


def _knob(config: Config, shape: Shape, longest: int, has: int) -> str | None:
    """The fewest changes that make the longest pair fit, the cheapest first; None where none of these do."""
    choices = list(_changes(config))
    for number in (1, 2, 3):
        for some in itertools.combinations(choices, number):
            changed = config
            for _, train, model in some:
                changed = changed.model_copy(
                    update={
                        "train": changed.train.model_copy(update=train),
                        "model": changed.model.model_copy(update=model),
                    }
                )
            room = _room(changed, shape, has)
            fits = room >= bytes_per_token(shape, changed.model, changed.train) * max(longest, 128)
            if fits and _can_be(changed):
                given = dict.fromkeys(text for name, _, _ in some for text in name.split())
                return " ".join(f"-o {text}" for text in given)
    return None


def _can_be(config: Config) -> bool:
    """Whether the combination would be taken."""
    try:
        Config.model_validate(config.model_dump())
    except ValueError:
        return False
    return True


def _changes(config: Config) -> Iterator[tuple[str, dict[str, object], dict[str, object]]]:
    """What may be changed: how it is written, and what it sets in `train` and in `model`."""
    train, model = config.train, config.model
    if not train.activation_checkpointing:
        yield "train.activation_checkpointing=true", {"activation_checkpointing": True}, {}
    if train.optimizer == "adamw" and model.lora is None:
        yield "train.optimizer=adamw_8bit", {"optimizer": "adamw_8bit"}, {}
    if train.strategy != "fsdp" and train.num_workers > 1:
        yield "train.strategy=fsdp", {"strategy": "fsdp"}, {}
    if train.gpus_per_worker == 1 and not train.min_workers:
        workers = 2 * train.num_workers
        while workers <= min(_MOST_WORKERS, train.global_batch_size):
            name = f"train.num_workers={workers}" + ("" if train.strategy == "fsdp" else " train.strategy=fsdp")
            yield name, {"num_workers": workers, "strategy": "fsdp"}, {}
            workers *= 2
    if train.optimizer != "adamw_8bit_bf16" and model.lora is None and model.dtype == "bfloat16":
        yield "train.optimizer=adamw_8bit_bf16", {"optimizer": "adamw_8bit_bf16"}, {}
    if train.use_gpu and not train.offload:
        named = "train.offload=true" if train.strategy == "fsdp" else "train.strategy=fsdp train.offload=true"
        yield named, {"strategy": "fsdp", "offload": True}, {}
    if model.lora is None:
        yield "model.lora.rank=16", {}, {"lora": LoRA(rank=16)}
    elif model.quantization is None and config.reference.engine != "vllm":
        lora = model.lora.model_copy(update={"quantization": "nf4"})
        yield "model.lora.quantization=nf4", {}, {"lora": lora}
