"""Attention in bfloat16 on a CPU: PyTorch's own result, and gradients as near to the exact ones as PyTorch's."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.model import cpu_attention
from dpo_ray.model.attention import visible
from tests.rounding import distance

# All queries; the last ones of the keys' positions; one; as many as a block has, and one more.
SIZES = [(11, 11), (3, 11), (1, 5), (4, 4), (5, 5)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 4)


def inputs(n: int, m: int, heads: int, kv_heads: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    shapes = (heads, n), (kv_heads, m), (kv_heads, m)
    return [torch.randn(1, *shape, 16).bfloat16().requires_grad_() for shape in shapes], torch.randn(1, heads, n, 16)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "scale": scale}
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kv_heads", "window", "scale"), product((4, 2), (None, 3), (None, 0.3)))
def test_values_are_pytorchs_and_gradients_are_the_exact_ones(
    size: tuple[int, int], kv_heads: int, window: int | None, scale: float | None
):
    given, upstream = inputs(*size, 4, kv_heads)
    mask = None if window is None and size[0] == size[1] else visible(given[0], given[1], window)
    out = cpu_attention.attend(*given, mask, scale)
    assert torch.equal(out, sdpa(*given, mask, scale))
    found = torch.autograd.grad(out, given, upstream.bfloat16())
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = torch.autograd.grad(sdpa(*exact, mask, scale), exact, upstream.bfloat16().double())
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        # Weights, their gradients and the products are rounded to 8 bits each.
        assert distance(mine.double(), other) < 3 * 2.0**-8 or float((mine - other).abs().max()) < 2.0**-8


def test_it_is_for_bfloat16_on_a_cpu():
    query = torch.zeros(1, 2, 3, 4)
    assert cpu_attention.serves(query.bfloat16())
    assert not cpu_attention.serves(query) and not cpu_attention.serves(query.half())
    assert not cpu_attention.serves(query.bfloat16().to("meta"))
