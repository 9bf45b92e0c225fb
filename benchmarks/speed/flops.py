"""The matrix products of a step, and how fast a machine computes them. What a step needs: dpo_ray.training.flops."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from dpo_ray.training.flops import ModelShape

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
