"""The packed row on a CPU: short pairs in rows of one call, long ones alone, and one gradient of it all."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from dpo_ray.model import packed_on_cpu
from dpo_ray.model.packed_on_cpu import STEP, attend, calls, serves
from dpo_ray.model.segment import Segment
from tests.rounding import GRADIENT, distance

# Tokens of shared, chosen and rejected: short and long, without one or two of them, and of one width twice.
LENGTHS = [
    (3, 2, 4),
    (20, 9, 3),
    (1, 1, 1),
    (40, 30, 50),
    (0, 3, 2),
    (5, 3, 0),
    (2, 0, 3),
    (60, 1, 90),
    (4, 0, 0),
    (33, 0, 0),
]


def segments_of(lengths: list[tuple[int, int, int]]) -> tuple[Segment, ...]:
    start, found = 0, []
    for parts in lengths:
        found.append(Segment(start, *parts))
        start += sum(parts)
    return tuple(found)


SEGMENTS = segments_of(LENGTHS)
TOKENS = sum(map(sum, LENGTHS))


def sees(window: int | None) -> Tensor:
    """[T, T] from the definition, a position at a time."""
    found = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for start, shared, chosen, rejected in SEGMENTS:
        cut = start + shared + chosen
        for query in range(start, cut + rejected):
            for key in range(start, query + 1):
                apart = query - key - (chosen if query >= cut > key else 0)
                found[query, key] = (window is None or apart < window) and (
                    query < cut or key < start + shared or key >= cut
                )
    return found


def exact(given: list[Tensor], upstream: Tensor, window: int | None, scale: float | None) -> tuple[Tensor, ...]:
    """The result and the gradients of query, key and value, in float64."""
    query, key, value = (x.detach().double().requires_grad_() for x in given)
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    out = scores.masked_fill(~sees(window), float("-inf")).softmax(-1) @ v
    return out, *torch.autograd.grad(out, (query, key, value), upstream.double())


@pytest.mark.parametrize("longest", [0, 130, 1000], ids=lambda longest: f"rows of at most {longest}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("kv_heads", "window", "value_size"), product((4, 2), (None, 7, 100), (16, 24)))
def test_it_is_what_the_definition_says(
    monkeypatch: pytest.MonkeyPatch,
    longest: int,
    dtype: torch.dtype,
    kv_heads: int,
    window: int | None,
    value_size: int,
):
    scale = 0.3 if value_size == 16 else None
    monkeypatch.setattr(packed_on_cpu, "LONGEST", longest)
    calls.cache_clear()
    torch.manual_seed(0)
    shapes = (4, 16), (kv_heads, 16), (kv_heads, value_size)
    given = [torch.randn(1, heads, TOKENS, size).to(dtype).requires_grad_() for heads, size in shapes]
    upstream = torch.randn(1, 4, TOKENS, value_size).to(dtype)
    out = attend(*given, SEGMENTS, window, scale)
    found = [out, *torch.autograd.grad(out, given, upstream)]
    calls.cache_clear()
    bound = 3 * 2.0**-8 if dtype == torch.bfloat16 else GRADIENT
    for mine, other in zip(found, exact(given, upstream, window, scale), strict=True):
        assert mine.dtype == dtype and mine.shape == other.shape
        assert distance(mine.detach().double(), other.detach()) < bound


def test_short_pairs_of_like_length_are_rows_of_one_call_and_long_ones_stand_alone():
    lengths = [(STEP, 0, 0), (packed_on_cpu.LONGEST, 1, 1), (1, 1, 1), (STEP, 1, 0), (2, 2, 2), (1, STEP, STEP - 1)]
    found = calls(segments_of(lengths), None)
    assert [(rows.width, len(rows.sees)) for rows in found.rows] == [(STEP, 3), (2 * STEP, 2)]
    assert [segment[1:] for segment in found.long] == [lengths[1]]
    assert len(set(found.order.tolist())) == sum(map(sum, lengths))


def test_no_more_is_padded_than_to_the_next_width():
    found = calls(SEGMENTS, None)
    for rows in found.rows:
        own = [len(set(row.tolist())) for row in rows.positions.view(-1, rows.width)]
        assert all(rows.width - STEP < length <= rows.width for length in own)


def test_it_serves_what_it_computes():
    query = torch.zeros(1, 2, 3, 4)
    assert serves(query) and serves(query.bfloat16())
    assert not serves(query.half()) and not serves(query.double()) and not serves(query.to("meta"))
