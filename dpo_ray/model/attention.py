"""Attention for the packed, prefix-shared layout, registered with transformers.

A pair lies in the packed row as [shared | chosen | rejected]: shared is the prompt and what both completions begin
with. Chosen attends to shared and itself, which is plain causal attention over [shared | chosen]; rejected attends
to shared and to itself, skipping chosen. Either may be empty. Pairs do not see each other. Any decoder that calls
transformers' attention interface with full causal attention runs unchanged on it. The layout follows
arXiv:2410.20305 (prefix sharing for DPO).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from dpo_ray.model import varlen

IMPLEMENTATION = "dpo_packed"


class Segment(NamedTuple):
    """Where a pair lies in the packed row: its start, and the lengths of its three parts in tokens."""

    start: int
    shared: int
    chosen: int
    rejected: int


class Segments:
    """The pairs of a packed row, in order and without gaps.

    One opaque object, for torch.compile looks into a tuple and would compile again for every other number of pairs.
    """

    def __init__(self, pairs: tuple[Segment, ...]):
        self.pairs = pairs


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Segment attention, with the signature of transformers' attention functions.

    On CUDA in half precision it is one variable-length flash attention, elsewhere two calls a pair.

    Args:
        query: [1, heads, T, D]; key and value: [1, kv_heads, T, D].
        segments: the pairs of the packed row, T tokens in all.

    Returns ([1, T, heads, D], None).
    """
    if segments is None:
        raise ValueError(f"{IMPLEMENTATION} attention needs the segments of the packed row")
    if query.dtype in (torch.bfloat16, torch.float16) and varlen.is_there(query.device):
        return _flash(query, key, value, segments.pairs, scaling), None
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for start, shared, chosen, rejected in segments.pairs:
        cut = start + shared + chosen
        end = cut + rejected
        q, k, v = (x[:, :, start:cut] for x in (query, key, value))
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
            )
        )
        if rejected == 0:
            continue
        common = slice(start, start + shared)
        k = torch.cat((key[:, :, common], key[:, :, cut:end]), dim=2)
        v = torch.cat((value[:, :, common], value[:, :, cut:end]), dim=2)
        # is_causal aligns to the top left where queries are fewer than keys; this mask aligns bottom right.
        mask = torch.ones(rejected, shared + rejected, dtype=torch.bool, device=query.device).tril(shared)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, cut:end], k, v, attn_mask=mask, scale=scaling, dropout_p=dropout, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _flash(query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scaling: float | None) -> Tensor:
    """All pairs in one call: the shared keys and values stand before chosen and again before rejected."""
    layout = varlen_layout(segments, query.device)
    k, v = (x[0].transpose(0, 1)[layout.keys] for x in (key, value))
    out = varlen.attend(
        query[0].transpose(0, 1).contiguous(),
        k,
        v,
        layout.query_ends,
        layout.key_ends,
        layout.longest_query,
        layout.longest_key,
        scale=scaling,
    )
    return out[None]


class VarlenLayout(NamedTuple):
    """The packed row as sequences of queries, each with its sequence of keys: bottom-right aligned causal attention."""

    keys: Tensor
    """[Tk] positions of the packed row from which keys and values are taken"""
    query_ends: Tensor
    """[sequences + 1] int32, cumulative lengths from 0; the queries are the packed row itself"""
    key_ends: Tensor
    """[sequences + 1] int32"""
    longest_query: int
    longest_key: int


@lru_cache(maxsize=4)  # every layer asks for the same one
def varlen_layout(segments: tuple[Segment, ...], device: torch.device) -> VarlenLayout:
    """Two sequences a pair, [shared | chosen] on itself and [rejected] on [shared | rejected]; none without queries."""
    queries, keys = [0], [0]
    positions: list[int] = []
    for start, shared, chosen, rejected in segments:
        cut = start + shared + chosen
        positions += range(start, cut)
        queries.append(shared + chosen)
        keys.append(shared + chosen)
        if rejected:
            positions += [*range(start, start + shared), *range(cut, cut + rejected)]
            queries.append(rejected)
            keys.append(shared + rejected)
    query_ends, key_ends = (torch.tensor(lengths).cumsum(0).int().to(device) for lengths in (queries, keys))
    return VarlenLayout(torch.tensor(positions, device=device), query_ends, key_ends, max(queries), max(keys))


def register() -> None:
    """Make `attn_implementation="dpo_packed"` known to transformers; repeating it changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)


def hide_from_compiler() -> None:
    """Let compiled layers call the packed attention as it is: what it does differs with every packed row."""
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(packed_attention))


def serves(config: Any) -> bool:
    """Whether every layer of a model with this configuration is plain full causal attention over rotary positions.

    Models with sliding windows, linear attention or other state between tokens are run unshared instead.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    soft_capped = getattr(config, "attn_logit_softcapping", None) is not None
    return kinds == {"full_attention"} and window is None and not soft_capped
