"""Token log-probs → the log-probs of the completions of a batch of pairs, as the losses read them.

B pairs; N tokens that bear the loss, of all completions; log-probs in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Summed completion log-probs of a batch of pairs under policy and reference, and token counts; each [B]."""

    policy_chosen: Tensor
    """Sums, with LD-DPO's weights where asked for; so are the next three."""
    policy_rejected: Tensor
    ref_chosen: Tensor | None
    """None for training without a reference."""
    ref_rejected: Tensor | None
    num_chosen_tokens: Tensor
    """That bear the loss; 0 where a row has no chosen completion (unpaired data)."""
    num_rejected_tokens: Tensor
    """0 where a row has no rejected completion."""
    mean_chosen: Tensor
    """Mean token log-prob under the policy, all tokens alike; 0 where there is no completion."""
    mean_rejected: Tensor
    policy_weight: Tensor | None = None
    """WPO's w(chosen)·w(rejected), detached; None where not asked for."""
    weight: Tensor | None = None
    """How many pairs each counts as; None: one. pair_loss leaves it to who averages."""
    margin: Tensor | None = None
    """What β·h should be at least, in units of the reward; None: 0."""
    preference: Tensor | None = None
    """P(chosen ≻ rejected); None: 1."""

    @property
    def reference(self) -> tuple[Tensor, Tensor]:
        """ref_chosen and ref_rejected. Raises ValueError where there is no reference."""
        if self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError("This loss compares with a reference, but the batch has no reference log-probs.")
        return self.ref_chosen, self.ref_rejected

    @property
    def chosen_logratios(self) -> Tensor:
        """log π(chosen) − log π_ref(chosen), [B] in nats. Raises ValueError where there is no reference."""
        return self.policy_chosen - self.reference[0]

    @property
    def rejected_logratios(self) -> Tensor:
        """log π(rejected) − log π_ref(rejected), [B] in nats. Raises ValueError where there is no reference."""
        return self.policy_rejected - self.reference[1]

    @property
    def margins(self) -> Tensor:
        """h, [B] in nats, without beta. Raises ValueError where there is no reference."""
        return self.chosen_logratios - self.rejected_logratios


def pair_logps(
    token_logprobs: Tensor,
    sequence_index: Tensor,
    num_pairs: int,
    *,
    ref_token_logprobs: Tensor | None = None,
    ld_alpha: float | None = None,
    log_collisions: Tensor | None = None,
) -> PairLogps:
    """Sum the tokens of a batch into the log-probs of its completions.

    Policy and reference are summed by the same operation. On CPU equal inputs therefore give log-ratios of exactly 0;
    on CUDA, which adds in no fixed order, only with torch.use_deterministic_algorithms.

    Args:
        token_logprobs: [N] under the policy, with gradient; [N] means that of each token of the batch that bears the
            loss.
        sequence_index: [N] 2·pair for a chosen token, 2·pair + 1 for a rejected one; in ascending order, and the
            tokens of a completion in theirs. A pair may lack one of its completions.
        ref_token_logprobs: [N] under the reference; None without one.
        ld_alpha: LD-DPO's α (arXiv:2409.06411): weight of tokens behind the length that both completions of a pair
            share, under policy and reference alike. None: all weigh 1.
        log_collisions: [N] log Σ_v π(v)² over the vocabulary at each position, for WPO's weights (arXiv:2406.11827):
            w(y) = exp(mean over tokens of log π(token) − log Σ_v π(v)²).
    """
    num_sequences = 2 * num_pairs
    num_tokens = sum_by_sequence(torch.ones_like(token_logprobs), sequence_index, num_sequences)

    def mean(values: Tensor) -> Tensor:
        return sum_by_sequence(values, sequence_index, num_sequences) / num_tokens.clamp(min=1)

    def total(values: Tensor) -> Tensor:
        if ld_alpha is not None:
            values = torch.where(_in_tail(num_tokens, sequence_index), ld_alpha * values, values)
        return sum_by_sequence(values, sequence_index, num_sequences)

    policy, means = total(token_logprobs), mean(token_logprobs)
    reference = None if ref_token_logprobs is None else total(ref_token_logprobs.to(token_logprobs))
    policy_weight = None
    if log_collisions is not None:
        log_weights = mean((token_logprobs - log_collisions).detach())
        policy_weight = torch.exp(log_weights[0::2] + log_weights[1::2])
    return PairLogps(
        policy_chosen=policy[0::2],
        policy_rejected=policy[1::2],
        ref_chosen=None if reference is None else reference[0::2],
        ref_rejected=None if reference is None else reference[1::2],
        num_chosen_tokens=num_tokens[0::2],
        num_rejected_tokens=num_tokens[1::2],
        mean_chosen=means[0::2],
        mean_rejected=means[1::2],
        policy_weight=policy_weight,
    )


def _in_tail(num_tokens: Tensor, sequence_index: Tensor) -> Tensor:
    """[N] whether a token lies behind the shorter length of its pair; num_tokens is [2B]."""
    counts = num_tokens.long()
    starts = counts.cumsum(0) - counts
    positions = torch.arange(len(sequence_index), device=sequence_index.device) - starts[sequence_index]
    shared = torch.minimum(counts[0::2], counts[1::2])
    return positions >= shared[sequence_index // 2]


def sum_by_sequence(token_logprobs: Tensor, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Sum token log-probs [N] over the sequences that they belong to ([N] → [num_sequences])."""
    total = torch.zeros(num_sequences, dtype=token_logprobs.dtype, device=token_logprobs.device)
    return total.index_add(0, sequence_index, token_logprobs)
