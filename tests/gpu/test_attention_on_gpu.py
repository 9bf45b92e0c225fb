"""The packed attention on a CUDA device: one variable-length flash attention is the same as a call a pair."""

from __future__ import annotations

import pytest
import torch

from dpo_ray.model.attention import Segments, packed_attention, window_mask
from dpo_ray.model.segment import Segment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# More prompt than answer, more answer than prompt, one token each, and pairs that lack a side.
SEGMENTS = (Segment(0, 300, 70, 40), Segment(410, 5, 90, 130), Segment(635, 1, 1, 1), Segment(638, 33, 0, 20),
            Segment(691, 17, 9, 0))  # fmt: skip
LENGTH = 717


@pytest.mark.parametrize("window", [None, 1, 37, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
def test_flash_attention_equals_attention_pair_by_pair_in_values_and_gradients(
    heads: int, kv_heads: int, window: int | None
):
    torch.manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    exact = [torch.randn(1, h, LENGTH, 64, device="cuda", dtype=torch.float32) for h in sizes]
    upstream = torch.randn(1, LENGTH, heads, 64, device="cuda")
    found = []
    for dtype in (torch.float32, torch.bfloat16):  # in float32 it is a call a pair
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
        mask = window_mask(local_size=window)
        out, _ = packed_attention(torch.nn.Module(), *inputs, mask, scaling=0.125, segments=Segments(SEGMENTS))
        (out.float() * upstream).sum().backward()
        found.append([out.detach().float(), *(x.grad.float() for x in inputs)])
    for flash, right in zip(found[1], found[0], strict=True):
        # bfloat16 keeps three digits; a query that saw another key would be off by the size of the values.
        assert (flash - right).abs().max() < 0.02 * right.abs().max()
