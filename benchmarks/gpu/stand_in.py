"""For a rehearsal: what the variable-length kernel computes, by plain products on a CPU, behind its own signature."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import varlen as kernel

from dpo_ray.model import varlen


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """As torch.nn.attention.varlen.varlen_attn has it: a query sees keys from `window_size[0]` before its own place to
    `window_size[1]` behind it, places counted from the end; -1 is without a bound."""
    if query.shape[1] != key.shape[1]:
        if not enable_gqa:
            raise RuntimeError("query heads and key heads differ, and enable_gqa is off")
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    lengths_q, lengths_k = (ends.diff().tolist() for ends in (cu_seq_q, cu_seq_k))
    assert max(lengths_q) <= max_q and max(lengths_k) <= max_k
    parts = []
    for q, k, v in zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * (scale or q.shape[-1] ** -0.5)
        ahead = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))
        left, right = window_size
        seen = (ahead <= right if right >= 0 else ahead == ahead) & (ahead >= -left if left >= 0 else ahead == ahead)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v.float()).to(query.dtype))
    return torch.cat(parts)


@contextmanager
def in_place_of_the_kernel() -> Iterator[None]:
    """Inside, packed attention takes the way that it takes on a GPU."""
    with (
        mock.patch.object(kernel, "varlen_attn", attend),
        mock.patch.object(varlen, "is_there", lambda device: True),
    ):
        yield
