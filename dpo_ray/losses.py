"""Preference losses: pure functions of summed log-probs.

B pairs; every argument and result is [B] unless stated.
h = (policy_chosen − ref_chosen) − (policy_rejected − ref_rejected), the margin without beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.config import HingeLoss, IPOLoss, Loss, RobustLoss, SigmoidLoss


@dataclass(frozen=True)
class PairLogps:
    """Summed completion log-probs of a batch of pairs under policy and reference, and token counts; each [B]."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    num_chosen_tokens: Tensor
    num_rejected_tokens: Tensor

    @property
    def chosen_logratios(self) -> Tensor:
        """log π(chosen) − log π_ref(chosen), [B] in nats."""
        return self.policy_chosen - self.ref_chosen

    @property
    def rejected_logratios(self) -> Tensor:
        """log π(rejected) − log π_ref(rejected), [B] in nats."""
        return self.policy_rejected - self.ref_rejected

    @property
    def margins(self) -> Tensor:
        """h, [B] in nats, without beta: comparable between runs with different beta."""
        return self.chosen_logratios - self.rejected_logratios


def sigmoid_loss(h: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, −log σ(βh) (arXiv:2305.18290 eq. 7), and its conservative form (ericmitchell.ai/cdpo.pdf)."""
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def robust_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Provably robust DPO (arXiv:2403.00409): unbiased under flips with probability `label_smoothing` < .5."""
    kept, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(h: Tensor, beta: float) -> Tensor:
    """max(0, 1 − βh) (arXiv:2305.10425, 2309.06657)."""
    return F.relu(1 - beta * h)


def ipo_loss(mean_chosen_logratios: Tensor, mean_rejected_logratios: Tensor, beta: float) -> Tensor:
    """(Δ̄_w − Δ̄_l − 1/2β)² on log-ratios averaged per token (arXiv:2310.12036 eq. 17)."""
    return (mean_chosen_logratios - mean_rejected_logratios - 1 / (2 * beta)) ** 2


def pair_loss(config: Loss, logps: PairLogps) -> Tensor:
    """The configured loss of each pair, [B]."""
    match config:
        case SigmoidLoss():
            return sigmoid_loss(logps.margins, config.beta, config.label_smoothing)
        case RobustLoss():
            return robust_loss(logps.margins, config.beta, config.label_smoothing)
        case HingeLoss():
            return hinge_loss(logps.margins, config.beta)
        case IPOLoss():
            return ipo_loss(
                logps.chosen_logratios / logps.num_chosen_tokens,
                logps.rejected_logratios / logps.num_rejected_tokens,
                config.beta,
            )


def rewards(config: Loss, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Implicit rewards of chosen and rejected, each [B], such that their difference is the margin the loss sees."""
    chosen, rejected = logps.chosen_logratios, logps.rejected_logratios
    if isinstance(config, IPOLoss):
        chosen, rejected = chosen / logps.num_chosen_tokens, rejected / logps.num_rejected_tokens
    return config.beta * chosen.detach(), config.beta * rejected.detach()


def zero_margin_loss(config: Loss) -> float:
    """What the loss of every pair is while the policy equals the reference."""
    match config:
        case SigmoidLoss() | RobustLoss():
            return math.log(2)
        case HingeLoss():
            return 1.0
        case IPOLoss():
            return 1 / (4 * config.beta**2)


def sum_by_sequence(token_logprobs: Tensor, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Sum token log-probs [N] over the sequences that they belong to ([N] → [num_sequences])."""
    total = torch.zeros(num_sequences, dtype=token_logprobs.dtype, device=token_logprobs.device)
    return total.index_add(0, sequence_index, token_logprobs)
