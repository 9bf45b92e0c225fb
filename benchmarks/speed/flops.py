"""How many floating-point operations a DPO step needs on the shared layout, and how fast a machine multiplies matrices.

P, C, R tokens of a pair's prompt, chosen and rejected completion. A multiplication and its addition count as two. Each
matrix of the model costs 2 operations a token and weight forward, and twice that backward. Norms, activations, softmax
and the optimizer are not counted: a floor is what the matrices alone need.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Lengths = tuple[int, int, int]
"""P, C, R."""


@dataclass(frozen=True)
class ModelShape:
    """The matrices of a decoder."""

    backbone: tuple[tuple[int, int], ...]
    """[out, in] of every matrix between the embeddings and the head, in all layers."""
    head: tuple[int, int]
    """[V, H] of the LM head."""
    num_layers: int
    attention_width: int
    """Query heads times their size."""

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Read from the model that a transformers configuration makes, without its weights."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        found = [m.weight.shape for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
        vocabulary, hidden = model.get_output_embeddings().weight.shape
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            backbone=tuple((rows, columns) for rows, columns in found),
            head=(vocabulary, hidden),
            num_layers=config.num_hidden_layers,
            attention_width=config.num_attention_heads * head_size,
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelShape:
        """What dataclasses.asdict and JSON made of one."""
        vocabulary, hidden = value["head"]
        return cls(
            backbone=tuple((rows, columns) for rows, columns in value["backbone"]),
            head=(vocabulary, hidden),
            num_layers=value["num_layers"],
            attention_width=value["attention_width"],
        )


def scored_pairs(lengths: Lengths) -> int:
    """Query-key pairs of a layer's causal attention over [prompt|chosen] and the rejected tokens behind the prompt."""
    prompt, chosen, rejected = lengths
    whole = prompt + chosen
    return whole * (whole + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2


def attention_flops(shape: ModelShape, lengths: Lengths) -> int:
    """Forward two products of queries with keys and of scores with values; backward four of that size."""
    return 12 * shape.attention_width * shape.num_layers * scored_pairs(lengths)


def pair_flops(shape: ModelShape, lengths: Lengths) -> int:
    """Forward and backward of a pair whose prompt is computed once; the head on the completions alone."""
    prompt, chosen, rejected = lengths
    weights = sum(rows * columns for rows, columns in shape.backbone)
    vocabulary, hidden = shape.head
    backbone = 6 * weights * (prompt + chosen + rejected)
    head = 6 * vocabulary * hidden * (chosen + rejected)
    return backbone + head + attention_flops(shape, lengths)


def flops(shape: ModelShape, pairs: Iterable[Lengths]) -> int:
    """Of all the pairs together."""
    return sum(pair_flops(shape, lengths) for lengths in pairs)


Gemm = tuple[int, int, int]
"""m, k, n of [m, k] times [k, n]."""


def gemms(shape: ModelShape, shared_rows: int, completion_rows: int) -> Counter[Gemm]:
    """The matrix products of a step, with how often each is computed.

    shared_rows: P+C+R of its pairs; completion_rows: their C+R.
    """
    counted: Counter[Gemm] = Counter()
    for rows, (out, into) in [*((shared_rows, m) for m in shape.backbone), (completion_rows, shape.head)]:
        counted[rows, into, out] += 1  # forward
        counted[rows, out, into] += 1  # gradient of the input
        counted[out, rows, into] += 1  # gradient of the weight
    return counted


def gemm_rate(counted: Counter[Gemm], dtype: str, device: str, seconds_each: float = 0.3) -> dict[str, Any]:
    """The rate of these products as a step mixes them, in GFLOP/s, and the rate of each.

    The fastest of the repetitions counts, for other work on the machine can only slow one down.
    """
    import torch

    number_type = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    total_flops, total_seconds, rates = 0, 0.0, {}
    for (m, k, n), times in counted.items():
        left = torch.randn(m, k, device=device).to(number_type)
        right = torch.randn(k, n, device=device).to(number_type)
        torch.mm(left, right)
        seconds: list[float] = []
        while sum(seconds) < seconds_each:
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            torch.mm(left, right)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        fastest = min(seconds)
        total_flops += times * 2 * m * k * n
        total_seconds += times * fastest
        rates[f"{m}x{k}x{n}"] = 2 * m * k * n / fastest / 1e9
    return {"gflops_per_second": total_flops / total_seconds / 1e9, "each": rates}
