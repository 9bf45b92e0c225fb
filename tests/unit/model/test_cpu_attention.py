"""Attention on a CPU: PyTorch's own result, and gradients as near to the exact ones as their dtype allows."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.model import cpu_attention
from tests.rounding import GRADIENT, distance

# All queries; the last ones of the keys' positions; one; as many as a block has, and one more.
SIZES = [(11, 11), (3, 11), (1, 5), (4, 4), (5, 5)]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 4)


def inputs(rows: int, n: int, m: int, heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    shapes = (heads, n), (kv_heads, m), (kv_heads, m)
    given = [torch.randn(rows, *shape, 16).to(dtype).requires_grad_() for shape in shapes]
    return given, torch.randn(rows, heads, n, 16).to(dtype)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "scale": scale}
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


def masks(rows: int, n: int, m: int, window: int | None) -> Tensor | None:
    """Of each row another one, where there are several."""
    if rows == 1 and n == m and window is None:
        return None
    sees = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    sees = sees if window is None else sees.triu(m - n - window + 1)
    if rows == 1:
        return sees
    own = sees.repeat(rows, 1, 1, 1)
    own[1, :, :, 0] = False  # of the first key alone, so that every query of more keys still sees one
    own[1, :, 0, 0] = True
    return own


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "kv_heads", "window"), product((1, 3), (4, 2), (None, 3)))
def test_values_are_pytorchs_and_gradients_are_the_exact_ones(
    size: tuple[int, int], dtype: torch.dtype, rows: int, kv_heads: int, window: int | None
):
    given, upstream = inputs(rows, *size, 4, kv_heads, dtype)
    sees = masks(rows, *size, window)
    out = cpu_attention.attend(*given, sees, 0.3)
    assert torch.equal(out, sdpa(*given, sees, 0.3))
    found = cpu_attention.gradients(*(x.detach() for x in given), sees, 0.3, upstream)
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = torch.autograd.grad(sdpa(*exact, sees, 0.3), exact, upstream.double())
    # Weights, their gradients and the products are rounded to 8 bits each.
    bound, alone = (3 * 2.0**-8, 2.0**-8) if dtype == torch.bfloat16 else (GRADIENT, GRADIENT)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == dtype and mine.shape == other.shape
        assert distance(mine.double(), other) < bound or float((mine - other).abs().max()) < alone
