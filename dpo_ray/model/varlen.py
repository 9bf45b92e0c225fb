"""PyTorch's variable-length flash attention, whose arguments differ between its versions. This alone knows how."""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor


@lru_cache
def is_there(device: torch.device) -> bool:
    """Whether a device has the kernel, which takes half precision."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and bool(_arguments())


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention of sequences that lie one behind the other. Where a sequence has fewer queries than keys, the
    last query sees all keys: aligned to the bottom right.

    Args:
        query: [Tq, heads, D]; key and value: [Tk, kv_heads, D]; in half precision.
        query_ends, key_ends: [sequences + 1] int32, cumulative lengths from 0.
        longest_query, longest_key: of a sequence, in tokens.
        scale: of the scores; None: 1/√D.
        window: how many keys a query sees, its own place included; None: all before it.

    Returns [Tq, heads, D].
    """
    from torch.nn.attention import varlen

    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _arguments():
            grouped = {"enable_gqa": True}
        else:  # before PyTorch 2.13
            each = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(each, dim=1) for x in (key, value))
    out = varlen.varlen_attn(
        query, key, value, query_ends, key_ends, longest_query, longest_key,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def missing() -> list[str]:
    """What the installed PyTorch does without, in words; nothing of the version that the project is tested with."""
    if not _arguments():
        return ["torch.nn.attention.varlen: packed pairs take two calls each"]
    return [] if "enable_gqa" in _arguments() else ["grouped heads: keys and values are repeated for each query head"]


@lru_cache
def _arguments() -> frozenset[str]:
    """Names of what the kernel takes; none where there is no such kernel."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return frozenset()
    return frozenset(signature(varlen.varlen_attn).parameters)
