"""Attention for the packed, prefix-shared layout, registered with transformers.

A pair lies in the packed row as [prompt | chosen | rejected]. Chosen attends to prompt and itself, which is
plain causal attention over [prompt | chosen]; rejected attends to the prompt and to itself, skipping chosen.
Either may be empty. Pairs do not see each other. Any decoder that calls transformers' attention interface with
full causal attention runs unchanged on it. The layout follows arXiv:2410.20305 (prefix sharing for DPO).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

IMPLEMENTATION = "dpo_packed"


class Segment(NamedTuple):
    """Where a pair lies in the packed row: its start, and the lengths of its three parts in tokens."""

    start: int
    prompt: int
    chosen: int
    rejected: int


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: list[Segment] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Segment attention, with the signature of transformers' attention functions.

    Args:
        query: [1, heads, T, D]; key and value: [1, kv_heads, T, D].
        segments: the pairs of the packed row, in order and without gaps, T tokens in all.

    Returns ([1, T, heads, D], None).
    """
    if segments is None:
        raise ValueError(f"{IMPLEMENTATION} attention needs the segments of the packed row")
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for start, prompt, chosen, rejected in segments:
        cut = start + prompt + chosen
        end = cut + rejected
        q, k, v = (x[:, :, start:cut] for x in (query, key, value))
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
            )
        )
        if rejected == 0:
            continue
        shared = slice(start, start + prompt)
        k = torch.cat((key[:, :, shared], key[:, :, cut:end]), dim=2)
        v = torch.cat((value[:, :, shared], value[:, :, cut:end]), dim=2)
        # is_causal aligns to the top left where queries are fewer than keys; this mask aligns bottom right.
        mask = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=query.device).tril(prompt)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, cut:end], k, v, attn_mask=mask, scale=scaling, dropout_p=dropout, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `attn_implementation="dpo_packed"` known to transformers; repeating it changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)


def serves(config: Any) -> bool:
    """Whether every layer of a model with this configuration is plain full causal attention over rotary positions.

    Models with sliding windows, linear attention or other state between tokens are run unshared instead.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    soft_capped = getattr(config, "attn_logit_softcapping", None) is not None
    return kinds == {"full_attention"} and window is None and not soft_capped
