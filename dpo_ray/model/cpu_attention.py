"""Causal attention in bfloat16 on a CPU, with a backward pass of its own.

PyTorch's kernel is fast forward. Backward it takes, for sequences of some hundred tokens, several times as long as the
matrix products that it is made of, which the CPU's own instructions for bfloat16 compute here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Queries whose weights exist at once in the backward pass: no more than a core's cache holds, for common heads."""


def serves(query: Tensor) -> bool:
    """Whether it is the faster one for a query of this dtype on this device."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Of queries that are the last of the keys' positions.

    Args:
        query: [1, heads, n, D]; key and value: [1, kv_heads, m, D].
        mask: [n, m] which keys each query sees, none behind its own position; None: all before it, with n = m.
        scale: of the scores; None: 1/√D.

    Returns [1, heads, n, D].
    """
    out: Tensor = _Attention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    """Keeps its inputs; the weights are made anew, a block of queries at a time."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        _, heads, n, size = query.shape
        kv_heads, m = key.shape[1:3]
        # Of the heads that share keys and values, all queries are one matrix.
        queries, grads = (x.view(kv_heads, heads // kv_heads, n, size) for x in (query[0], grad[0]))
        d_query = torch.empty_like(queries, memory_format=torch.contiguous_format)
        d_key, d_value = (torch.zeros(x.shape[1:], dtype=torch.float32) for x in (key, value))
        for first in range(0, n, BLOCK):
            last = min(first + BLOCK, n)
            seen = m - n + last  # no query of the block sees a later key
            q, d_out = (x[:, :, first:last].reshape(kv_heads, -1, size) for x in (queries, grads))
            k, v = key[0, :, :seen], value[0, :, :seen]
            sees = (
                torch.ones(last - first, seen, dtype=torch.bool).tril_(seen - last + first)
                if mask is None
                else mask[first:last, :seen]
            )
            bias = torch.zeros(sees.shape, dtype=q.dtype).masked_fill_(~sees, float("-inf"))
            scores = torch.bmm(q, k.mT).mul_(ctx.scale).view(kv_heads, -1, last - first, seen).add_(bias)
            with torch.enable_grad():
                weights = scores.requires_grad_().softmax(-1)
            d_weights = torch.bmm(d_out, v.mT).view_as(weights)
            [d_scores] = torch.autograd.grad(weights, scores, d_weights)
            d_scores = d_scores.mul_(ctx.scale).view(kv_heads, -1, seen)
            d_value[:, :seen] += torch.bmm(weights.detach().view(kv_heads, -1, seen).mT, d_out)
            d_query[:, :, first:last] = torch.bmm(d_scores, k).view(kv_heads, -1, last - first, size)
            d_key[:, :seen] += torch.bmm(d_scores.mT, q)
        d_key, d_value = (x[None].to(key.dtype) for x in (d_key, d_value))
        return d_query.view(1, heads, n, size), d_key, d_value, None, None
