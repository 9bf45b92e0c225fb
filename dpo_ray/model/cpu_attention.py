"""Causal attention on a CPU, with a backward pass of its own.

PyTorch's kernel is fast forward. Backward it takes, in bfloat16 and for sequences of some hundred tokens, several times
as long as the matrix products that it is made of, which the CPU's own instructions compute here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Queries whose weights exist at once in the backward pass: no more than a core's cache holds, for common heads."""


def attend(query: Tensor, key: Tensor, value: Tensor, sees: Tensor | None, scale: float) -> Tensor:
    """Of queries that are the last of the keys' positions; nothing is kept for a backward pass.

    Args:
        query: [B, heads, n, D]; key: [B, kv_heads, m, D]; value: [B, kv_heads, m, Dv].
        sees: [B, 1, n, m] or [n, m] which keys each query sees, none behind its own position; None: all before it, with
            n = m.
        scale: of the scores.

    Returns [B, heads, n, Dv].
    """
    grouped = query.shape[1] != key.shape[1]
    with torch.no_grad():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=sees, is_causal=sees is None, scale=scale, enable_gqa=grouped
        )


def gradients(
    query: Tensor, key: Tensor, value: Tensor, sees: Tensor | None, scale: float, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, in their shapes and dtype; the weights are made anew, a block of queries at a time.

    Args:
        d_out: [B, heads, n, Dv], the gradient of what `attend` returned for the other arguments.
    """
    rows, heads, n, size = query.shape
    kv_heads, m = key.shape[1:3]
    shared = heads // kv_heads  # heads that share keys and values, all of whose queries are one matrix
    queries, upstream = (x.reshape(rows, kv_heads, shared, n, x.shape[-1]) for x in (query, d_out))
    keys, values = (x.reshape(rows * kv_heads, m, x.shape[-1]) for x in (key, value))
    d_query = torch.empty_like(queries, memory_format=torch.contiguous_format)
    d_key, d_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (keys, values))
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        seen = m - n + last  # no query of the block sees a later key
        q, d = (x[:, :, :, first:last].reshape(rows * kv_heads, -1, x.shape[-1]) for x in (queries, upstream))
        k, v = keys[:, :seen], values[:, :seen]
        if sees is None:
            block = torch.ones(last - first, seen, dtype=torch.bool).tril_(seen - last + first)
        else:
            block = sees[..., first:last, :seen]
        bias = torch.zeros(block.shape, dtype=q.dtype).masked_fill_(~block, float("-inf"))
        scores = torch.bmm(q, k.mT).mul_(scale).view(rows, -1, last - first, seen).add_(bias)
        with torch.enable_grad():
            weights = scores.requires_grad_().softmax(-1)
        d_weights = torch.bmm(d, v.mT).view_as(weights)
        [d_scores] = torch.autograd.grad(weights, scores, d_weights)
        d_scores = d_scores.mul_(scale).view(rows * kv_heads, -1, seen)
        d_value[:, :seen] += torch.bmm(weights.detach().view(rows * kv_heads, -1, seen).mT, d)
        d_query[:, :, :, first:last] = torch.bmm(d_scores, k).view(rows, kv_heads, shared, -1, size)
        d_key[:, :seen] += torch.bmm(d_scores.mT, q)
    return d_query.view(query.shape), d_key.view(key.shape).to(key.dtype), d_value.view(value.shape).to(value.dtype)
