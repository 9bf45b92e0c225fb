"""Hidden states → log-probs of given tokens, without ever holding all logits.

N completion tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ray.model.routing import Routing

TILE_TOKENS = 256  # 256 × 150k logits in float32 are 0.15 GB
"""Rows whose logits exist at once; three tiles of them are the most that is held. Backward a tile is all rows and so
many entries of the vocabulary that there are as many logits: each entry's gradient is then written once."""


@dataclass(frozen=True)
class Head:
    """A linear output layer: logits = cap · tanh(x / cap) with x = scale · (h Wᵀ + b)."""

    weight: Tensor
    """W [V, H]"""
    bias: Tensor | None = None
    """b [V]"""
    scale: float = 1.0
    cap: float | None = None
    """Soft cap of the logits (Gemma 2, arXiv:2408.00118); None leaves them as they are."""

    def part(self, entries: slice) -> Head:
        """Of some entries of the vocabulary."""
        return replace(self, weight=self.weight[entries], bias=self.bias[entries] if self.bias is not None else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] → [n, V] in float32, with no gradient."""
        x = _matmul_float32(hidden, self.weight.T)
        if self.bias is not None:
            x += self.bias
        if self.scale != 1.0:
            x *= self.scale
        return x.div_(self.cap).tanh_().mul_(self.cap) if self.cap is not None else x


class TokenScores(NamedTuple):
    """What is known of each completion token; each [N] in float32. Of them the log-probs alone carry gradients."""

    logprobs: Tensor
    """log p(target), in nats."""
    log_collisions: Tensor | None = None
    """log Σ_v p(v)², in nats."""
    entropies: Tensor | None = None
    """−Σ_v p(v) log p(v), in nats."""
    mean_logits: Tensor | None = None
    """Σ_v logit(v) / V."""
    routing: Routing | None = None
    """Of all tokens of the micro-batch, where the model is a mixture of experts and it was asked for."""


def token_scores(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    with_collisions: bool = False,
    with_entropies: bool = False,
) -> TokenScores:
    """Score the target at each position; logits exist tile by tile, and again in the backward pass.

    Args:
        hidden: [N, H] the hidden states that predict the targets, in the head's dtype.
        targets: [N] token ids.
        with_collisions: also the log collision probabilities.
        with_entropies: also the entropies and the mean logits.
    """
    logprobs, collisions, entropies, means = _TokenScores.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, head.scale, head.cap, with_collisions, with_entropies
    )
    return TokenScores(
        logprobs,
        collisions if with_collisions else None,
        entropies if with_entropies else None,
        means if with_entropies else None,
    )


class _TokenScores(torch.autograd.Function):
    """Keeps hidden states, weights and targets for the backward pass, in which each tile of logits is made anew.

    Their normalizers are kept too, so that backward a tile need not span the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        cap: float | None,
        with_collisions: bool,
        with_entropies: bool,
    ) -> tuple[Tensor, ...]:
        head = Head(weight, bias, scale, cap)
        # Tensors of their own, no views of one: FSDP hooks its backward pass to what a module returns.
        logprobs, collisions, entropies, means = (hidden.new_zeros(len(targets), dtype=torch.float32) for _ in range(4))
        normalizers = torch.empty_like(logprobs)
        for tile in tiles(len(targets), TILE_TOKENS):
            logits = head.logits(hidden[tile])
            normalizers[tile] = logits.logsumexp(-1)
            logprobs[tile] = logits.gather(-1, targets[tile, None]).squeeze(-1) - normalizers[tile]
            if with_collisions or with_entropies:
                probabilities = (logits - normalizers[tile, None]).exp_()
            if with_entropies:
                entropies[tile] = torch.special.entr(probabilities).sum(-1)
                means[tile] = logits.mean(-1)
            if with_collisions:
                # The largest probability is at least 1/V, so that no square that matters is lost below 0.
                collisions[tile] = probabilities.square_().sum(-1).log()
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.scale, ctx.cap = scale, cap
        ctx.mark_non_differentiable(collisions, entropies, means)
        ctx.set_materialize_grads(False)
        return logprobs, collisions, entropies, means

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        if grad is None:
            return (None,) * 8
        head = Head(weight, bias, ctx.scale, ctx.cap)
        of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
        # Summed over tiles in float32.
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if of_hidden else None
        d_weight = torch.empty_like(weight) if of_weight else None
        d_bias = torch.empty_like(bias) if of_bias else None
        for tile in tiles(len(weight), max(1, TILE_TOKENS * len(weight) // max(TILE_TOKENS, len(targets)))):
            part = head.part(tile)
            logits = part.logits(hidden)
            if head.cap is not None:
                slope = (logits / head.cap).square_().neg_().add_(1)
            d_logits = logits.sub_(normalizers[:, None]).exp_().mul_(-grad[:, None])
            inside = (targets >= tile.start) & (targets < tile.stop)
            places = (targets - tile.start).clamp_(0, d_logits.shape[1] - 1)
            d_logits.scatter_add_(-1, places[:, None], (grad * inside)[:, None])
            if head.cap is not None:
                d_logits.mul_(slope)
            if head.scale != 1.0:
                d_logits.mul_(head.scale)
            if d_bias is not None:
                d_bias[tile] = d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                _add_product(d_hidden, d_logits, part.weight)
            if d_weight is not None:
                torch.mm(d_logits.T, hidden, out=d_weight[tile])
        return (d_hidden.to(hidden.dtype) if d_hidden is not None else None, d_weight, d_bias, *(None,) * 5)


def tiles(length: int, size: int) -> list[slice]:
    """Neighbouring ones of at most this size, in order."""
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32. On CUDA products of bfloat16 keep float32's digits; elsewhere they are rounded once."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in total's float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _matmul_float32(a, b)
