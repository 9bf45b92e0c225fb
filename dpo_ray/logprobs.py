"""Hidden states → log-probs of given tokens, without ever holding all logits.

N completion tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_TOKENS = 512  # 512 × 150k logits in float32 are 0.3 GB: the most that is held at once


def token_logprobs(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, with_collisions: bool = False
) -> Tensor:
    """log p(target) at each position, in float32.

    Args:
        hidden: [N, H] the hidden states that predict the targets.
        head: maps [n, H] to logits [n, V]; recomputed in the backward pass, chunk by chunk.
        targets: [N] token ids.
        with_collisions: give also the log collision probability log Σ_v p(v)² of each position, without gradient.

    Returns [N] float32 in nats; [2, N] with collisions, the log-probs first.
    """
    chunks = [
        checkpoint(_chunk, h, head, t, with_collisions, use_reentrant=False)
        if torch.is_grad_enabled()
        else _chunk(h, head, t, with_collisions)
        for h, t in zip(hidden.split(_CHUNK_TOKENS), targets.split(_CHUNK_TOKENS), strict=True)
    ]
    if not chunks:
        return hidden.new_zeros((2, 0) if with_collisions else (0,), dtype=torch.float32)
    return torch.cat(chunks, dim=-1)


def _chunk(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, with_collisions: bool) -> Tensor:
    logits = head(hidden).float()
    normalizer = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - normalizer
    if not with_collisions:
        return logprobs
    with torch.no_grad():
        collisions = (logits - normalizer[:, None]).mul_(2).logsumexp(-1)
    return torch.stack((logprobs, collisions))
