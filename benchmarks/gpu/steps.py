"""Steps of a large model: ours on packed pairs, compiled too, beside a plain padded one; and the same in bfloat16."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.scale import Scale, model_options, train_options, write_model
from benchmarks.speed.clock import Clock
from benchmarks.speed.pairs import fixed_pair, lengths_of, real_tokens
from dpo_ray.model import attention
from dpo_ray.model.logprobs import TILE_TOKENS
from dpo_ray.model.policy import CompletionScorer, compile_layers, load_policy, torch_dtype
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.batch import Share
from dpo_ray.training.checkpoint import TrainState
from dpo_ray.training.flops import ModelShape, flops
from dpo_ray.training.memory import bytes_per_token, shape_of, state_bytes
from dpo_ray.training.optim import make_optimizer
from dpo_ray.training.parallel import Rank, parallelize
from dpo_ray.training.step import Learner

_BETA = 0.1
_GIB = 2**30
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense products of bfloat16, by the data sheets of NVIDIA."""


def pairs_of(scale: Scale, count: int, vocabulary: int) -> list[TokenizedPair]:
    """Pairs of random tokens, their lengths log-normal, and reference log-probs of a model that knows nothing."""
    dice = random.Random(0)
    longest = 4 * max(scale.medians)
    rows = []
    for n in range(count):
        sizes = [min(longest, max(1, round(dice.lognormvariate(math.log(m), 0.6)))) for m in scale.medians]
        row = fixed_pair(dice, vocabulary, sizes)
        _, chosen, rejected = lengths_of(row)
        each = -math.log(vocabulary)
        rows.append(
            TokenizedPair(f"{n}", **row, chosen_ref_logprobs=[each] * chosen, rejected_ref_logprobs=[each] * rejected)
        )
    return rows


def learner_of(scale: Scale, folder: Path, dtype: str, *, compiled: bool = False, packed: bool = True) -> Learner:
    """A policy in training on the device, as a worker of one has it."""
    options = train_options(scale)
    with nullcontext() if packed else mock.patch.object(attention, "serves", return_value=False):
        policy = load_policy(folder)
    scorer = CompletionScorer(policy).to(scale.device).train()
    assert scorer.packs == packed
    if compiled:
        compile_layers(policy, backend="inductor" if scale.device.type == "cuda" else "eager")
    me = Rank(0, 1, scale.device)
    forward = parallelize(scorer, options.strategy, me, torch_dtype(dtype))
    return Learner(forward, scorer, make_optimizer(policy, options), None, options, me, TrainState())


def same_step(scale: Scale, folder: Path) -> list[dict[str, Any]]:
    """A step of the small model in bfloat16, on packed and on padded pairs, against float32: loss, gradient's norm, and
    log-probs of all tokens. A row for each way of computing."""
    model = write_model(folder / "small", scale.small)
    pairs = pairs_of(scale, scale.pairs_per_microbatch, scale.small["vocab_size"])
    found: dict[str, tuple[torch.Tensor, float, float]] = {}
    for name, dtype, packed in (
        ("padded, float32", "float32", False),
        ("packed, float32", "float32", True),
        ("padded, bfloat16", "bfloat16", False),
        ("packed, bfloat16", "bfloat16", True),
    ):
        learner = learner_of(scale, model, dtype, packed=packed)
        with torch.no_grad():
            batch = learner.scorer.collate(pairs).to(scale.device)
            logprobs = learner.forward(batch).logprobs.double().cpu()
        learner.options = train_options(scale, global_batch_size=len(pairs))
        result = learner.step(Share([list(pairs)], pairs[0]), 0.0, None)
        found[name] = logprobs, result.metrics["loss"], result.metrics["grad_norm"]
    exact, _, exact_norm = found["padded, float32"]
    rows = [
        {
            "computed": name,
            "loss": loss,
            "gradient's norm": norm,
            "norm / float32's": norm / exact_norm,
            "mean |Δ log-prob|": float((logprobs - exact).abs().mean()),
            "largest |Δ log-prob|": float((logprobs - exact).abs().max()),
        }
        for name, (logprobs, loss, norm) in found.items()
    ]
    padded, packed_row = rows[2], rows[3]
    if packed_row["mean |Δ log-prob|"] > 1.5 * padded["mean |Δ log-prob|"] + 1e-6:
        raise AssertionError(f"packed pairs in bfloat16 are further from float32 than padded ones: {rows}")
    if rows[1]["largest |Δ log-prob|"] > 1e-3:
        raise AssertionError(f"packed pairs are not what padded ones are in float32: {rows}")
    return rows


def speed(scale: Scale, folder: Path, way: str) -> list[dict[str, Any]]:
    """Steps of the large model in bfloat16, timed. A row.

    Args:
        way: packed, compiled (packed, with compiled layers) or plain: padded, all logits at once, under autocast, as a
            trainer without tricks has it; all on float32 weights with fused AdamW.
    """
    model = write_model(folder / "large", scale.large)
    size, steps = scale.pairs_per_step, scale.steps + 2
    pairs = pairs_of(scale, size * steps, scale.large["vocab_size"])
    shape = ModelShape.of(AutoConfig.from_pretrained(model))
    step = _plain_step(scale, model) if way == "plain" else _our_step(scale, model, compiled=way == "compiled")
    clock, seconds = Clock(), []
    for n in range(steps):
        batch = pairs[n * size : (n + 1) * size]
        groups = [batch[i : i + scale.pairs_per_microbatch] for i in range(0, len(batch), scale.pairs_per_microbatch)]
        clock.start()
        loss = step(groups)
        seconds.append(clock.stop()["wall"])
    timed = [_row(pair) for pair in pairs[2 * size :]]
    took = sum(seconds[2:])
    needed = flops(shape, [lengths_of(row) for row in timed])
    peak = next((p for name, p in _PEAK_FLOPS.items() if name in _device_name(scale)), None)
    row = {
        "step": way,
        "weights": shape_of(ModelFolder.of(model_options(model, "bfloat16"))).parameters,
        "tokens/s": real_tokens(timed) / took,
        "median s a step": statistics.median(seconds[2:]),
        "first step, s": seconds[0],
        "TFLOP/s": needed / took / 1e12,
        "MFU": None if peak is None else needed / took / peak,
        "peak, GiB": _peak(scale) / _GIB,
        "loss of the last": loss,
    }
    if way == "packed":
        row |= _planned(scale, model, pairs)
    return [row]


def _our_step(scale: Scale, model: Path, *, compiled: bool) -> Callable[[Sequence[list[TokenizedPair]]], float]:
    learner = learner_of(scale, model, "bfloat16", compiled=compiled)

    def step(groups: Sequence[list[TokenizedPair]]) -> float:
        return learner.step(Share(list(groups), groups[0][0]), 5e-6, None).metrics["loss"]

    return step


def _plain_step(scale: Scale, model: Path) -> Callable[[Sequence[list[TokenizedPair]]], float]:
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    policy.to(scale.device).train()
    optimizer = make_optimizer(policy, train_options(scale))

    def step(groups: Sequence[list[TokenizedPair]]) -> float:
        total = 0.0
        for pairs in groups:
            ids, attended, bears, reference = _padded(pairs, scale.device)
            with torch.autocast(scale.device.type, torch.bfloat16):
                logits = policy(input_ids=ids, attention_mask=attended, use_cache=False).logits
            logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            ratios = (logprobs * bears[:, 1:]).sum(-1) - reference
            loss = -logsigmoid(_BETA * (ratios[0::2] - ratios[1::2])).sum() / scale.pairs_per_step
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _padded(pairs: Sequence[TokenizedPair], device: torch.device) -> tuple[torch.Tensor, ...]:
    """[2 · pairs, T] ids, what is attended, what bears the loss; [2 · pairs] reference log-probs, summed."""
    rows = [
        (pair.prompt_ids, ids, sum(logprobs or ()))
        for pair in pairs
        for ids, logprobs in (
            (pair.chosen_ids, pair.chosen_ref_logprobs),
            (pair.rejected_ids, pair.rejected_ref_logprobs),
        )
    ]
    width = max(len(prompt) + len(ids) for prompt, ids, _ in rows)
    ids, attended, bears = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for n, (prompt, completion, _) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[n, :end] = torch.tensor([*prompt, *completion])
        attended[n, :end] = 1
        bears[n, len(prompt) : end] = 1
    reference = torch.tensor([logps for *_, logps in rows])
    return ids.to(device), attended.to(device), bears.to(device), reference.to(device)


def _planned(scale: Scale, model: Path, pairs: Sequence[TokenizedPair]) -> dict[str, Any]:
    """What the plan says of the memory of the widest micro-batch."""
    options, ours = train_options(scale), model_options(model, "bfloat16")
    shape = shape_of(ModelFolder.of(ours))
    size = scale.pairs_per_microbatch
    tokens = max(sum(p.num_tokens for p in pairs[i : i + size]) for i in range(0, len(pairs), size))
    logits = 3 * TILE_TOKENS * 4 * shape.vocabulary
    planned = state_bytes(shape, ours, options, 1) + tokens * bytes_per_token(shape, ours, options) + logits
    peak = _peak(scale)
    return {"planned, GiB": planned / _GIB, "planned / peak": planned / peak if peak else None}


def _row(pair: TokenizedPair) -> dict[str, Any]:
    return {name: getattr(pair, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def _device_name(scale: Scale) -> str:
    return torch.cuda.get_device_name(scale.device) if scale.device.type == "cuda" else "CPU"


def _peak(scale: Scale) -> int:
    return torch.cuda.max_memory_allocated(scale.device) if scale.device.type == "cuda" else 0
