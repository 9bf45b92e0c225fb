"""The packed, prefix-shared attention, and which models may run on it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers

from dpo_ray.model import varlen
from dpo_ray.model.attention import (
    IMPLEMENTATION,
    Segments,
    packed_attention,
    register,
    serves,
    varlen_layout,
    window_mask,
    window_of,
)
from dpo_ray.model.segment import Segment

# The last two lack a side.
SEGMENTS = (Segment(0, 3, 2, 4), Segment(9, 1, 1, 1), Segment(12, 5, 3, 1), Segment(21, 3, 2, 0), Segment(26, 2, 0, 3))
LENGTH = 31


def positions(segments: tuple[Segment, ...]) -> list[int]:
    """Of each token in its own sequence, where rejected follows on shared."""
    found: list[int] = []
    for _, shared, chosen, rejected in segments:
        found += [*range(shared + chosen), *range(shared, shared + rejected)]
    return found


def visible(segments: tuple[Segment, ...], window: int | None = None) -> torch.Tensor:
    """Which key each query sees, [T, T], written down from the definition, one position at a time."""
    sees = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    place = positions(segments)
    for start, prompt, chosen, rejected in segments:
        cut = start + prompt + chosen
        for query in range(start, cut + rejected):
            for key in range(start, query + 1):
                within = window is None or place[query] - place[key] < window
                sees[query, key] = within and (query < cut or key < start + prompt or key >= cut)
    return sees


def expected_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """From the definition, over the whole row: [1, T, heads, D]."""
    heads, size = query.shape[1], query.shape[3]
    k, v = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    scores = (query @ k.mT) * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.exp() * visible(SEGMENTS, window)
    of_sinks = 0.0 if sinks is None else sinks.exp().view(1, heads, 1, 1)
    return (weights / (weights.sum(-1, keepdim=True) + of_sinks) @ v).transpose(1, 2)


def random_inputs(heads: int, kv_heads: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, h, LENGTH, 8, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


CAPS_AND_SINKS: list[dict[str, Any]] = [
    {},
    {"scaling": 0.3},
    {"softcap": 0.7},
    {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)},
]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 6, 100])
@pytest.mark.parametrize("extra", CAPS_AND_SINKS, ids=["plain", "scaled", "soft cap", "sinks"])
def test_packed_attention_equals_masked_attention_over_the_whole_row(
    kv_heads: int, window: int | None, extra: dict[str, Any]
):
    inputs = random_inputs(4, kv_heads)
    mask = window_mask(local_size=window)
    out, weights = packed_attention(torch.nn.Module(), *inputs, mask, segments=Segments(SEGMENTS), **extra)
    assert weights is None
    named = {"sinks" if name == "s_aux" else name: value for name, value in extra.items()}
    expected = expected_attention(*inputs, window, **named)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(out.shape, dtype=torch.float64)
    leaves = [*inputs, *([extra["s_aux"]] if "s_aux" in extra else [])]
    mine, other = (torch.autograd.grad((x * upstream).sum(), leaves, retain_graph=True) for x in (out, expected))
    for got, right in zip(mine, other, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-11)


def test_the_layout_for_variable_length_attention_shows_each_query_the_keys_that_it_sees():
    layout = varlen_layout(SEGMENTS, torch.device("cpu"))
    sees = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    ends = zip(layout.query_ends.tolist(), layout.key_ends.tolist(), strict=True)
    for (q, k), (q_end, k_end) in itertools.pairwise(ends):
        for query in range(q, q_end):
            # Bottom-right aligned: the last query sees all keys of its sequence, the one before all but the last.
            sees[query, layout.keys[k : k_end - (q_end - 1 - query)]] = True
    assert torch.equal(sees, visible(SEGMENTS))
    assert layout.query_ends[-1] == LENGTH and layout.key_ends[-1] == len(layout.keys)
    assert layout.longest_query == layout.query_ends.diff().max()
    assert layout.longest_key == layout.key_ends.diff().max()


def flash_by_its_documentation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's varlen_attn, which runs on CUDA only: aligned to the bottom right, `window_size` keys to either side."""
    left, right = window_size
    parts = []
    for (q, q_end), (k, k_end) in zip(*(itertools.pairwise(x.tolist()) for x in (cu_seq_q, cu_seq_k)), strict=True):
        assert q_end - q <= max_q and k_end - k <= max_k
        at = torch.arange(q_end - q)[:, None] + (k_end - k) - (q_end - q)
        apart = at - torch.arange(k_end - k)
        sees = (apart >= -right) & ((apart <= left) if left >= 0 else True)
        q_part, k_part, v_part = (
            x[a:b].transpose(0, 1)[None] for x, a, b in ((query, q, q_end), (key, k, k_end), (value, k, k_end))
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            q_part, k_part, v_part, attn_mask=sees, scale=scale, enable_gqa=enable_gqa
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
def test_one_call_of_the_variable_length_kernel_is_the_same(
    kv_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_by_its_documentation)
    monkeypatch.setattr(varlen, "is_there", lambda device: True)
    inputs = [x.detach().bfloat16() for x in random_inputs(4, kv_heads)]
    out, _ = packed_attention(
        torch.nn.Module(), *inputs, window_mask(local_size=window), scaling=0.3, segments=Segments(SEGMENTS)
    )
    expected = expected_attention(*(x.double() for x in inputs), window, scaling=0.3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.03)  # of values of order 1, in bfloat16
    if window == 3:
        other = expected_attention(*(x.double() for x in inputs), 4, scaling=0.3)
        assert (out.double() - other).abs().max() > 0.3


def test_the_kernel_is_not_asked_for_heads_that_it_does_not_take(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("called")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", refuse)
    monkeypatch.setattr(varlen, "is_there", lambda device: True)
    for size, of_value in ((512, 512), (16, 8)):
        q, k = torch.randn(2, 1, 2, 3, size).bfloat16()
        v = torch.randn(1, 2, 3, of_value).bfloat16()
        out, _ = packed_attention(torch.nn.Module(), q, k, v, None, segments=Segments((Segment(0, 1, 1, 1),)))
        assert out.shape == (1, 3, 2, of_value)


class Layer(torch.nn.Module):
    """As much of an attention layer as the packed attention looks at."""

    def __init__(self, **says: Any):
        super().__init__()
        for name, value in says.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("layer", "asked", "message"),
    [
        (Layer(is_causal=False), {}, "is causal, and the layer is not"),
        (Layer(), {"is_causal": False}, "is causal, and the layer is not"),
        (Layer(), {"position_bias": torch.zeros(1)}, "no position bias"),
        (Layer(config=transformers.Gemma2Config()), {}, "soft cap"),
        (Layer(sinks=torch.zeros(1)), {}, "sinks"),
        (Layer(), {"attention_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "no mask of the model's own"),
    ],
)
def test_another_attention_than_it_computes_is_refused(layer: Layer, asked: dict[str, Any], message: str):
    x = torch.zeros(1, 1, 3, 4)
    asked = {"attention_mask": None, **asked}
    with pytest.raises(ValueError, match=message):
        packed_attention(layer, x, x, x, segments=Segments((Segment(0, 1, 1, 1),)), **asked)


def test_packed_attention_without_segments_is_refused():
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="segments"):
        packed_attention(torch.nn.Module(), x, x, x, None)


def test_registering_twice_changes_nothing():
    register()
    register()
    assert transformers.AttentionInterface()[IMPLEMENTATION] is packed_attention


WINDOWED = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (transformers.LlamaConfig(), None),
        (transformers.Qwen2Config(use_sliding_window=False, sliding_window=4096), None),
        (transformers.MistralConfig(sliding_window=None), None),
        (transformers.GemmaConfig(), None),
        (transformers.MistralConfig(sliding_window=4096), 4096),
        (transformers.Qwen2Config(**WINDOWED), 64),
        (transformers.Qwen2Config(**{**WINDOWED, "max_window_layers": 32}), None),
        (transformers.Gemma2Config(), 4096),
        (transformers.Gemma3TextConfig(), 4096),
        (transformers.Qwen3NextConfig(), None),
        (transformers.Lfm2Config(full_attn_idxs=[2]), None),
        (transformers.GptOssConfig(), 128),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "model_type") else str(value),
)
def test_causal_attention_is_served_with_windows_and_beside_other_layers(config: Any, window: int | None):
    assert serves(config)
    assert window_of(config) == window


@pytest.mark.parametrize(
    "config",
    [
        transformers.Llama4TextConfig(),  # chunks
        transformers.Gemma3TextConfig(use_bidirectional_attention=True),
        transformers.GlmMoeDsaConfig(),  # an indexer chooses what is seen
    ],
    ids=lambda config: type(config).__name__,
)
def test_attention_of_another_kind_is_not_served(config: Any):
    assert not serves(config)
