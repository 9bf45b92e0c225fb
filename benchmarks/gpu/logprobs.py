"""Hidden states to log-probs of given tokens, alone: by tiles of several sizes, with all logits at once, and the bare
matrix products beside them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.scale import Scale
from benchmarks.speed.clock import Clock
from dpo_ray.model import logprobs
from dpo_ray.model.logprobs import Head, token_scores

_GIB = 2**30


def alone(scale: Scale, folder: Path) -> list[dict[str, Any]]:
    """Forward and backward over one batch of tokens in bfloat16: milliseconds, peak memory beside the inputs, and
    the largest |Δ| from the log-probs of all logits in float32. A row for each way."""
    tokens, hidden_size, vocabulary = scale.logprobs
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=scale.device, dtype=torch.bfloat16)
    weight = (torch.randn(vocabulary, hidden_size, device=scale.device) * hidden_size**-0.5).to(torch.bfloat16)
    targets = torch.randint(vocabulary, (tokens,), device=scale.device)
    exact = _exact(hidden, weight, targets)
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "bare products": _bare,
        "all logits at once": lambda h, w: _naive(h, w, targets),
    }
    rows = [_measured(scale, name, compute, hidden, weight, exact) for name, compute in ways.items()]
    for size in scale.tiles:
        with mock.patch.object(logprobs, "TILE_TOKENS", size):  # by which the backward pass goes too
            tiled = _measured(
                scale,
                f"tiles of {size}",
                lambda h, w: token_scores(h, Head(w), targets).logprobs,
                hidden,
                weight,
                exact,
            )
        rows.append(tiled)
    return rows


def _measured(
    scale: Scale, name: str, compute: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, exact: Tensor
) -> dict[str, Any]:
    on_gpu = scale.device.type == "cuda"
    clock, seconds, peak, found = Clock(), [], 0, exact
    try:
        for _ in range(1 + scale.repeats):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            before = torch.cuda.memory_allocated() if on_gpu else 0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            clock.start()
            found = compute(h, w)
            found.sum().backward()
            seconds.append(clock.stop()["wall"])
            peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"way": name, "ms": None, "peak beside, GiB": None, "largest |Δ|": None}
    return {
        "way": name,
        "ms": 1e3 * statistics.median(seconds[1:]),
        "peak beside, GiB": peak / _GIB,
        "largest |Δ|": None if name == "bare products" else float((found.detach() - exact).abs().max()),
    }


def _naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def _bare(hidden: Tensor, weight: Tensor) -> Tensor:
    """The three products that none can do without: logits, and the gradients of hidden states and weights."""
    return _Products.apply(hidden, weight)  # type: ignore[no-any-return,no-untyped-call]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, logits)
        return logits[:, 0].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.T @ hidden


@torch.no_grad()
def _exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[tokens] in float32, a few at a time."""
    whole = weight.float()
    parts = [
        (h.float() @ whole.T).log_softmax(-1).gather(-1, t[:, None]).squeeze(-1)
        for h, t in zip(hidden.split(512), targets.split(512), strict=True)
    ]
    return torch.cat(parts)
