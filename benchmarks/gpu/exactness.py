"""Packed attention by the variable-length kernel, against products in float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.scale import Scale
from dpo_ray.model.attention import Segments, packed_attention, window_mask
from dpo_ray.model.segment import Segment

_HEADS = {"as many heads of keys": (8, 8), "grouped heads": (8, 2), "one head of keys": (8, 1)}
# bfloat16 has 8 bits: the kernel's error is held against that of plain products which are computed in it.
_MOST = 2.0


def attention(scale: Scale, folder: Path) -> list[dict[str, Any]]:
    """Largest |Δ| from float64 in values and in the gradients of queries, keys and values, and how many times that of
    plain products in bfloat16 it is. A row for each kind of heads, without a sliding
    window and with one."""
    starts = itertools.accumulate((sum(parts) for parts in scale.attention), initial=0)
    segments = tuple(Segment(start, *parts) for start, parts in zip(starts, scale.attention, strict=False))
    tokens = sum(map(sum, scale.attention))
    rows = []
    for (name, (heads, kv_heads)), window in itertools.product(_HEADS.items(), (None, scale.window)):
        seen, mask = _seen(segments, tokens, window).to(scale.device), window_mask(local_size=window)
        torch.manual_seed(0)
        given = [
            torch.randn(1, h, tokens, scale.head_size, device=scale.device, dtype=torch.bfloat16)
            for h in (heads, kv_heads, kv_heads, heads)
        ]
        exact = _with_gradients(given, torch.float64, lambda q, k, v, seen=seen: _plain(q, k, v, seen))
        plain = _with_gradients(given, torch.bfloat16, lambda q, k, v, seen=seen: _plain(q, k, v, seen))
        packed = _with_gradients(
            given,
            torch.bfloat16,
            lambda q, k, v, mask=mask: packed_attention(torch.nn.Module(), q, k, v, mask, segments=Segments(segments))[
                0
            ],
        )
        errors, usual = ([_largest(a, b) for a, b in zip(found, exact, strict=True)] for found in (packed, plain))
        rows.append(
            {
                "heads": f"{heads}:{kv_heads}, {name}",
                "tokens": tokens,
                "window": window,
                **{f"|Δ| {what}": e for what, e in zip(("values", "dq", "dk", "dv"), errors, strict=True)},
                "times plain bfloat16's": max(e / max(u, 1e-9) for e, u in zip(errors, usual, strict=True)),
            }
        )
    worst = max(row["times plain bfloat16's"] for row in rows)
    if worst > _MOST:
        raise AssertionError(f"the kernel is off by {worst:.1f} times what plain products in bfloat16 are: {rows}")
    return rows


def _seen(segments: tuple[Segment, ...], tokens: int, window: int | None) -> Tensor:
    """[T, T] whether a token of the packed row sees another: written from what the layout says, not from the kernel."""
    places = torch.cat(
        [
            torch.cat((torch.arange(shared + chosen), torch.arange(shared, shared + rejected)))
            for _, shared, chosen, rejected in segments
        ]
    )
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, shared, chosen, rejected in segments:
        cut, end = start + shared + chosen, start + shared + chosen + rejected
        seen[start:cut, start:cut] = torch.ones(cut - start, cut - start).tril().bool()
        seen[cut:end, start : start + shared] = True
        seen[cut:end, cut:end] = torch.ones(rejected, rejected).tril().bool()
    return seen if window is None else seen & (places[:, None] - places[None] < window)


def _plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """[1, T, heads, D]"""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _with_gradients(given: list[Tensor], dtype: torch.dtype, compute: Any) -> list[Tensor]:
    """Values, and gradients of queries, keys and values, of the product with the last of those given."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in given[:3])
    out = compute(q, k, v)
    out.backward(given[3].to(dtype).transpose(1, 2))
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [out.detach(), q.grad, k.grad, v.grad]


def _largest(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).abs().max())
