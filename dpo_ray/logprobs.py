"""Hidden states → log-probs of given tokens, without ever holding all logits.

N completion tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_TOKENS = 512  # 512 × 150k logits in float32 are 0.3 GB: the most that is held at once


def token_logprobs(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """log p(target) at each position, in float32.

    Args:
        hidden: [N, H] the hidden states that predict the targets.
        head: maps [n, H] to logits [n, V]; recomputed in the backward pass, chunk by chunk.
        targets: [N] token ids.

    Returns [N] float32 in nats.
    """
    chunks = [
        checkpoint(_chunk, h, head, t, use_reentrant=False) if torch.is_grad_enabled() else _chunk(h, head, t)
        for h, t in zip(hidden.split(_CHUNK_TOKENS), targets.split(_CHUNK_TOKENS), strict=True)
    ]
    return torch.cat(chunks) if chunks else hidden.new_zeros(0, dtype=torch.float32)


def _chunk(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    logits = head(hidden).float()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
