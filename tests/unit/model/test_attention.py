"""The packed, prefix-shared attention, and which models may run on it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers

from dpo_ray.model.attention import IMPLEMENTATION, Segment, Segments, packed_attention, register, serves, varlen_layout

# The last two lack a side.
SEGMENTS = (Segment(0, 3, 2, 4), Segment(9, 1, 1, 1), Segment(12, 5, 3, 1), Segment(21, 3, 2, 0), Segment(26, 2, 0, 3))
LENGTH = 31


def visible(segments: tuple[Segment, ...]) -> torch.Tensor:
    """Which key each query sees, [T, T], written down from the definition, one position at a time."""
    sees = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for start, prompt, chosen, rejected in segments:
        cut = start + prompt + chosen
        for query in range(start, cut + rejected):
            for key in range(start, query + 1):
                sees[query, key] = query < cut or key < start + prompt or key >= cut
    return sees


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_packed_attention_equals_masked_attention_over_the_whole_row(heads: int, kv_heads: int, scaling: float | None):
    torch.manual_seed(0)
    query = torch.randn(1, heads, LENGTH, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, kv_heads, LENGTH, 8, dtype=torch.float64)
    out, weights = packed_attention(
        torch.nn.Module(), query, key, value, None, scaling=scaling, segments=Segments(SEGMENTS)
    )
    assert weights is None
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = (query @ k.mT) * (8**-0.5 if scaling is None else scaling)
    expected = scores.masked_fill(~visible(SEGMENTS), float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-12)


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


def test_packed_attention_without_segments_is_refused():
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="segments"):
        packed_attention(torch.nn.Module(), x, x, x, None)


def test_registering_twice_changes_nothing():
    register()
    register()
    assert transformers.AttentionInterface()[IMPLEMENTATION] is packed_attention


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(),
        transformers.Qwen2Config(),
        transformers.Qwen2Config(use_sliding_window=False, sliding_window=4096),
        transformers.Qwen3Config(),
        transformers.MistralConfig(sliding_window=None),
        transformers.GemmaConfig(),
    ],
    ids=["Llama", "Qwen2", "Qwen2 with the window off", "Qwen3", "Mistral without window", "Gemma"],
)
def test_models_of_full_causal_attention_are_served(config: Any):
    assert serves(config)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MistralConfig(sliding_window=4096),
        transformers.Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=0),
        transformers.Gemma2Config(),
        transformers.Gemma3TextConfig(),
        transformers.MambaConfig(),
        transformers.Qwen3NextConfig(),
        transformers.Lfm2Config(full_attn_idxs=[2]),
    ],
    ids=["Mistral", "Qwen2 with a window", "Gemma2", "Gemma3", "Mamba", "Qwen3-Next", "LFM2"],
)
def test_models_with_windows_soft_caps_or_other_state_are_not_served(config: Any):
    assert not serves(config)
