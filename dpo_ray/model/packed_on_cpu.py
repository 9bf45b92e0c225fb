"""Attention of the packed row on a CPU: short pairs many at a time, all of it one step of the backward pass.

A call of the kernel costs about as much as a pair of some dozen tokens does in it, so short pairs of like length stand
in one call as its rows, padded to one width. A pair that is longer is two calls, [shared | chosen] on itself and
[rejected] on [shared | rejected], of which nothing is computed that is not seen. And the gradient of a slice would be a
packed row of zeros but for the slice, made and added for each of the pairs: here it is written once.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ray.model import cpu_attention
from dpo_ray.model.segment import Segment

LONGEST = 256
"""Tokens of a pair that is one row of a call with others."""
STEP = 32
"""Widths of calls are multiples of it, so that few kernels are made: each width needs its own."""


class Rows(NamedTuple):
    """Short pairs as the rows of one call."""

    positions: Tensor
    """[rows · width] of the packed row; behind a pair's tokens its first one, which none of them sees there"""
    width: int
    sees: Tensor
    """[rows, 1, width, width] bool; what is behind a pair sees itself"""


class Calls(NamedTuple):
    """A packed row of T tokens as calls of the kernel, whose results follow each other: rows, then long pairs."""

    rows: tuple[Rows, ...]
    long: tuple[Segment, ...]
    order: Tensor
    """[T] where each token of the packed row is in the results"""


def serves(query: Tensor) -> bool:
    """Whether it is there for a query of this dtype on this device."""
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float32)


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], window: int | None, scale: float | None
) -> Tensor:
    """Segment attention.

    Args:
        query: [1, heads, T, D]; key: [1, kv_heads, T, D]; value: [1, kv_heads, T, Dv].
        segments: the pairs of the packed row, in order and without gaps.
        window: tokens that a query sees, itself included; None: all before it.
        scale: of the scores; None: 1/√D.

    Returns [1, heads, T, Dv].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Packed.apply(query, key, value, segments, window, scale)  # type: ignore[no-untyped-call]
    return out


@lru_cache(maxsize=4)  # every layer asks for the same one
def calls(segments: tuple[Segment, ...], window: int | None) -> Calls:
    """How a packed row is computed."""
    widths = [(-(-sum(segment[1:]) // STEP) * STEP, segment) for segment in segments]
    short = sorted((width, segment) for width, segment in widths if sum(segment[1:]) <= LONGEST)
    long = tuple(segment for segment in segments if sum(segment[1:]) > LONGEST)
    order = torch.empty(sum(sum(segment[1:]) for segment in segments), dtype=torch.long)
    rows, first = [], 0
    for width, grouped in groupby(short, key=lambda pair: pair[0]):
        members = [segment for _, segment in grouped]
        positions = torch.tensor([[segment.start] * width for segment in members])
        for row, segment in enumerate(members):
            length = sum(segment[1:])
            positions[row, :length] = torch.arange(segment.start, segment.start + length)
            order[segment.start : segment.start + length] = torch.arange(length) + first + row * width
        rows.append(Rows(positions.flatten(), width, torch.stack([_sees(x, width, window) for x in members])[:, None]))
        first += len(members) * width
    for segment in long:
        length = sum(segment[1:])
        order[segment.start : segment.start + length] = torch.arange(length) + first
        first += length
    return Calls(tuple(rows), long, order)


def _sees(segment: Segment, width: int, window: int | None) -> Tensor:
    """[width, width] which tokens of its row each one sees."""
    cut = segment.shared + segment.chosen
    length = cut + segment.rejected
    place = torch.arange(width)
    position = torch.where(place < cut, place, place - segment.chosen)
    sees = place[:, None] >= place
    sees[cut:length, segment.shared : cut] = False
    sees[length:] = False
    if window is not None:
        sees &= position[:, None] - position < window
    return sees | torch.eye(width, dtype=torch.bool)


class _Packed(torch.autograd.Function):
    """Keeps its inputs; the weights are made anew."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: tuple[Segment, ...],
        window: int | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.how = segments, window, scale
        plan = calls(segments, window)
        done = []
        for rows in plan.rows:
            q, k, v = (_taken(x, rows) for x in (query, key, value))
            done.append(_flat(cpu_attention.attend(q, k, v, rows.sees, scale)))
        for segment in plan.long:
            start, cut = segment.start, segment.start + segment.shared + segment.chosen
            q, k, v = (x[:, :, start:cut] for x in (query, key, value))
            done.append(cpu_attention.attend(q, k, v, _window_alone(cut - start, window), scale)[0])
            if segment.rejected:
                q, k, v = _rejected(query, key, value, segment, window)
                done.append(cpu_attention.attend(q, k, v, _bottom_right(q, k, window), scale)[0])
        return _ordered(done, plan.order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        given = query, key, value = ctx.saved_tensors
        segments, window, scale = ctx.how
        plan = calls(segments, window)
        done: tuple[list[Tensor], ...] = [], [], []
        for rows in plan.rows:
            # Of what is behind a pair some gradient comes, which `order` leaves out; its own keys see none of the pair.
            q, k, v = (_taken(x, rows) for x in given)
            found = cpu_attention.gradients(q, k, v, rows.sees, scale, _taken(d_out, rows))
            for one, gradient in zip(done, found, strict=True):
                one.append(_flat(gradient))
        for segment in plan.long:
            start, cut = segment.start, segment.start + segment.shared + segment.chosen
            sees = _window_alone(cut - start, window)
            q, k, v = (x[:, :, start:cut] for x in given)
            of_chosen = cpu_attention.gradients(q, k, v, sees, scale, d_out[:, :, start:cut])
            for one, gradient in zip(done, of_chosen, strict=True):
                one.append(gradient[0])
            if segment.rejected == 0:
                continue
            q, k, v = _rejected(query, key, value, segment, window)
            upstream = d_out[:, :, cut : cut + segment.rejected]
            d_query, *d_others = cpu_attention.gradients(q, k, v, _bottom_right(q, k, window), scale, upstream)
            done[0].append(d_query[0])
            for one, before, gradient in zip(done[1:], of_chosen[1:], d_others, strict=True):
                of_shared = gradient.shape[2] - segment.rejected
                before[0, :, segment.shared - of_shared : segment.shared] += gradient[0, :, :of_shared]
                one.append(gradient[0, :, of_shared:])
        return *(_ordered(one, plan.order) for one in done), None, None, None


def _taken(packed: Tensor, rows: Rows) -> Tensor:
    """[1, heads, T, D] → [rows, heads, width, D]."""
    _, heads, _, size = packed.shape
    return packed[0].index_select(1, rows.positions).view(heads, -1, rows.width, size).transpose(0, 1)


def _flat(of_rows: Tensor) -> Tensor:
    """[rows, heads, width, D] → [heads, rows · width, D]."""
    return of_rows.transpose(0, 1).reshape(of_rows.shape[1], -1, of_rows.shape[3])


def _ordered(done: list[Tensor], order: Tensor) -> Tensor:
    """[heads, n, D] of each call → [1, heads, T, D] of the packed row."""
    return torch.cat(done, dim=1).index_select(1, order)[None]


def _rejected(
    query: Tensor, key: Tensor, value: Tensor, segment: Segment, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries of rejected, and what keys and values it sees some of."""
    start, shared = segment.start, segment.start + segment.shared
    cut = shared + segment.chosen
    end = cut + segment.rejected
    # The first rejected token sees no further back than this, and those after it less far.
    seen = start if window is None else max(start, shared - window + 1)
    k, v = (torch.cat((x[:, :, seen:shared], x[:, :, cut:end]), dim=2) for x in (key, value))
    return query[:, :, cut:end], k, v


def _window_alone(length: int, window: int | None) -> Tensor | None:
    """[length, length] of causal attention in a window; None where all of it is in there."""
    if window is None or window >= length:
        return None
    return torch.ones(length, length, dtype=torch.bool).tril_().triu_(1 - window)


def _bottom_right(query: Tensor, key: Tensor, window: int | None) -> Tensor | None:
    """[n, m] for queries at the last n of the keys' positions; None where that is plain causal attention."""
    n, m = query.shape[2], key.shape[2]
    if n == m:
        return _window_alone(n, window)
    sees = torch.ones(n, m, dtype=torch.bool).tril_(m - n)
    return sees if window is None else sees.triu_(m - n - window + 1)
