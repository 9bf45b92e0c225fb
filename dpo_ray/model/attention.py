"""Attention for the packed, prefix-shared layout, registered with transformers.

A pair lies in the packed row as [shared | chosen | rejected]: shared is the prompt and what both completions begin
with. Chosen attends to shared and itself, which is plain causal attention over [shared | chosen]; rejected attends
to shared and to itself, skipping chosen. Either may be empty. Pairs do not see each other. Any decoder that calls
transformers' attention interface with causal attention runs unchanged on it. The layout follows arXiv:2410.20305
(prefix sharing for DPO).

Positions of [shared | rejected] are contiguous, as those of [shared | chosen] are. So a sliding window of w tokens,
which shows a query itself and the w - 1 before it, is the same on the packed row as on each sequence alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_ray.model import packed_on_cpu, varlen
from dpo_ray.model.segment import Segment

IMPLEMENTATION = "dpo_packed"


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Segment attention, with the signature of transformers' attention functions.

    On CUDA in half precision it is one variable-length flash attention, on a CPU what packed_on_cpu makes of it,
    elsewhere two calls a pair. These have no soft caps, and give no gradient to the log-sum-exp that sinks need: both
    are computed step by step, as transformers does.

    Args:
        query: [1, heads, T, D]; key and value: [1, kv_heads, T, D].
        attention_mask: the layer's sliding window, as `window_mask` gives it; None where it sees everything before.
        segments: the pairs of the packed row, T tokens in all.
        softcap: scores become cap · tanh(score / cap) (Gemma 2, arXiv:2408.00118).
        s_aux: [heads] the score of a sink in each head, to which weight goes and from which nothing comes (gpt-oss).

    Returns ([1, T, heads, D], None). Raises ValueError where it is asked for another attention than it computes.
    """
    if segments is None:
        raise ValueError(f"{IMPLEMENTATION} attention needs the segments of the packed row")
    _require_known(module, softcap, s_aux, kwargs)
    window = _window(attention_mask)
    stepwise = softcap is not None or s_aux is not None
    if not stepwise and query.dtype in (torch.bfloat16, torch.float16) and _flash_takes(query, value):
        return _flash(query, key, value, segments.pairs, scaling, window), None
    if not stepwise and not dropout and packed_on_cpu.serves(query):
        out = packed_on_cpu.attend(query, key, value, segments.pairs, window, scaling)
        return out.transpose(1, 2).contiguous(), None
    grouped = query.shape[1] != key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of queries that are the last of the keys' positions: [1, heads, n, D]."""
        everything = q.shape[2] == k.shape[2] and (window is None or window >= k.shape[2])
        if stepwise:
            return stepwise_attention(q, k, v, visible(q, k, window), scaling, dropout, softcap, s_aux)
        # is_causal aligns to the top left where queries are fewer than keys; the mask aligns bottom right.
        mask = None if everything else visible(q, k, window)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=everything, scale=scaling, dropout_p=dropout, enable_gqa=grouped
        )

    parts = []
    for start, shared, chosen, rejected in segments.pairs:
        cut = start + shared + chosen
        end = cut + rejected
        parts.append(attend(*(x[:, :, start:cut] for x in (query, key, value))))
        if rejected == 0:
            continue
        # The first rejected token sees no further back than this, and those after it less far.
        seen = start if window is None else max(start, start + shared - window + 1)
        k, v = (torch.cat((x[:, :, seen : start + shared], x[:, :, cut:end]), dim=2) for x in (key, value))
        parts.append(attend(query[:, :, cut:end], k, v))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """[n, m] which of m keys each of n queries sees, the queries being at the last n of the keys' positions."""
    n, m = query.shape[2], key.shape[2]
    sees = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    return sees if window is None else sees.triu(m - n - window + 1)


def stepwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Tensor,
    scaling: float | None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with all its weights held, for what no kernel computes; the softmax is in float32 at least.

    Args:
        query: [1, heads, n, D]; key and value: [1, kv_heads, m, D].
        sees: [n, m].
        sinks: [heads], see packed_attention.

    Returns [1, heads, n, D].
    """
    groups = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    scores = query @ k.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees, float("-inf"))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:
        of_sinks = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, of_sinks), dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    return F.dropout(weights, dropout) @ v if dropout else weights @ v


def _require_known(module: nn.Module, softcap: float | None, sinks: Tensor | None, asked: dict[str, Any]) -> None:
    """Raises ValueError where the layer is not what the packed attention computes, or does not say all that it is."""
    if asked.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{IMPLEMENTATION} attention is causal, and the layer is not")
    if asked.get("position_bias") is not None:
        raise ValueError(f"{IMPLEMENTATION} attention has no position bias, and the layer wants one")
    if softcap is None and getattr(getattr(module, "config", None), "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"the configuration has a soft cap, of which the layer does not tell {IMPLEMENTATION} attention"
        )
    if sinks is None and getattr(module, "sinks", None) is not None:
        raise ValueError(f"the layer has sinks, of which it does not tell {IMPLEMENTATION} attention")


_FLASH_HEAD = 256  # the largest size of a head


def _flash_takes(query: Tensor, value: Tensor) -> bool:
    return query.shape[-1] == value.shape[-1] <= _FLASH_HEAD and varlen.is_there(query.device)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Segment, ...],
    scaling: float | None,
    window: int | None,
) -> Tensor:
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
        window=window,
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


def window_mask(*_: Any, local_size: int | None = None, **__: Any) -> Tensor | None:
    """What layers get for a mask: their sliding window in tokens, [1, 1, 1, 1] on the CPU; None where they have none.

    transformers applies the window of the mask, and some models hand their layers another one that is not applied.
    """
    return None if local_size is None else torch.tensor(local_size).view(1, 1, 1, 1)


def _window(mask: Tensor | None) -> int | None:
    if mask is None:
        return None
    if mask.numel() != 1 or mask.dtype != torch.long:
        raise ValueError(f"{IMPLEMENTATION} attention takes no mask of the model's own")
    return int(mask)


def register() -> None:
    """Make `attn_implementation="dpo_packed"` known to transformers; repeating it changes nothing, and hides nothing
    less from the compiler."""
    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, window_mask)


def hide_from_compiler() -> None:
    """Let compiled layers call the packed attention as it is: what it does differs with every packed row."""
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(packed_attention))


KINDS = frozenset({"full_attention", "sliding_attention", "linear_attention", "conv", "hybrid", "mlp", "moe"})
"""Kinds of layers, as configurations name them, whose attention, where they have one, is one that is computed here."""


def serves(config: Any) -> bool:
    """Whether all attention of a model with this configuration is one that the packed attention computes.

    What else carries state between tokens does not matter here.
    """
    text = config.get_text_config()
    bidirectional = getattr(text, "use_bidirectional_attention", None) or not getattr(text, "is_causal", True)
    return set(getattr(text, "layer_types", None) or ()) <= KINDS and not bidirectional


def window_of(config: Any) -> int | None:
    """Tokens that a layer with a sliding window sees, itself included; None where no layer has one."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return window if not kinds or "sliding_attention" in kinds else None


def is_stepwise(model: nn.Module) -> bool:
    """Whether some of the model's attention has a soft cap or sinks, and so all its weights held."""
    capped = getattr(getattr(model, "config", None), "attn_logit_softcapping", None) is not None
    return capped or any(getattr(module, "sinks", None) is not None for module in model.modules())
