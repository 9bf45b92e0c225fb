"""The papers' formulas: pure functions of log-ratios, margins and numbers.

B pairs; every argument and result is [B] unless stated, and every log-prob in nats.
    Δ  log-ratio of a completion, log π(y) − log π_ref(y); Δ_w of the chosen, Δ_l of the rejected one
    h  the margin Δ_w − Δ_l, without beta
    a  mean token log-prob of a completion under the policy
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST_EXPONENT = 80.0  # e^88 overflows float32, and ∞ − ∞ or 0·∞ in a margin would be NaN


def sigmoid_loss(
    h: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    margin: Tensor | float = 0.0,
    preference: Tensor | float = 1.0,
) -> Tensor:
    """DPO, −log σ(βh) (arXiv:2305.18290 eq. 7), and its conservative form (ericmitchell.ai/cdpo.pdf).

    With x = βh − m for the `margin` m that β·h should have (Llama 2, arXiv:2307.09288 eq. 2; as an offset of DPO in
    arXiv:2402.10571), and the conservative form's probability that the label is right for each pair by itself
    (arXiv:2409.06691): −p·log σ(x) − (1−p)·log σ(−x), with p the `preference` P(chosen ≻ rejected).
    """
    right = preference * (1 - label_smoothing) + (1 - preference) * label_smoothing
    wrong = preference * label_smoothing + (1 - preference) * (1 - label_smoothing)
    x = beta * h - margin
    return -right * F.logsigmoid(x) - wrong * F.logsigmoid(-x)


def robust_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(−(1−ε)·log σ(βh) + ε·log σ(−βh)) / (1−2ε) (arXiv:2403.00409): unbiased where ε = `label_smoothing` flip."""
    kept, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(h: Tensor, beta: float) -> Tensor:
    """max(0, 1 − βh) (arXiv:2305.10425, 2309.06657)."""
    return F.relu(1 - beta * h)


def ipo_loss(h: Tensor, beta: float, preference: Tensor | float = 1.0) -> Tensor:
    """(h − 1/2β)² (arXiv:2310.12036 eq. 17), with h of means per token or of sums.

    With p the `preference` P(chosen ≻ rejected): (h − (2p−1)/2β)² (arXiv:2409.06691), which is the mean over labels
    that are right with probability p, p·(h − 1/2β)² + (1−p)·(h + 1/2β)², less what does not depend on h.
    """
    return (h - (2 * preference - 1) / (2 * beta)) ** 2


def exo_pair_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """KL(softmax(βh, 0) ‖ (1−ε, ε)) (arXiv:2402.00856), with ε = `label_smoothing` > 0."""
    chosen = torch.sigmoid(beta * h) * (F.logsigmoid(beta * h) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-beta * h) * (F.logsigmoid(-beta * h) - math.log(label_smoothing))
    return chosen + rejected


def nca_pair_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−log σ(βΔ_w) − ½ log σ(−βΔ_w) − ½ log σ(−βΔ_l) (arXiv:2402.05369)."""
    apart = F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)
    return -F.logsigmoid(beta * chosen) - 0.5 * apart


def bco_pair_loss(chosen: Tensor, rejected: Tensor, beta: float, reward_mean: Tensor | float) -> Tensor:
    """−log σ(βΔ_w − δ) − log σ(−(βΔ_l − δ)) (arXiv:2404.04656), with δ = `reward_mean`, a scalar."""
    return -F.logsigmoid(beta * chosen - reward_mean) - F.logsigmoid(reward_mean - beta * rejected)


def sppo_hard_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(Δ_w − 1/2β)² + (Δ_l + 1/2β)² (arXiv:2405.00675)."""
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """1 − σ(βΔ_w) + σ(βΔ_l) (arXiv:2408.06266)."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """σ(βΔ_w) + 1 − σ(βh) (arXiv:2408.06266)."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def discopop_loss(h: Tensor, beta: float, tau: float) -> Tensor:
    """(1−m)·(−log σ(βh)) + m·e^(−βh) with m = σ(βh/τ) (arXiv:2406.08414)."""
    logits = beta * h
    # m·e^(−βh) in one exponential: apart, m underflows and e^(−βh) overflows for a very negative margin.
    exponential = torch.exp(F.logsigmoid(logits / tau) - logits)
    return torch.sigmoid(-logits / tau) * -F.logsigmoid(logits) + exponential


def simpo_loss(h: Tensor, beta: float, target_margin: float, margin: Tensor | float = 0.0) -> Tensor:
    """−log σ(β(a_w − a_l) − γ) (arXiv:2405.14734 eq. 6), with h = a_w − a_l and γ = `target_margin`.

    A pair's own `margin` m is added to γ, as in Llama 2's (arXiv:2307.09288 eq. 2): −log σ(βh − γ − m).
    """
    return -F.logsigmoid(beta * h - target_margin - margin)


def orpo_loss(mean_chosen: Tensor, log_odds_ratio: Tensor, odds_ratio_weight: float) -> Tensor:
    """−a_w − λ·log σ(log odds ratio) (arXiv:2403.07691 eq. 6–7)."""
    return -mean_chosen - odds_ratio_weight * F.logsigmoid(log_odds_ratio)


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """log(p/(1−p)) of p = e^a, finite for every a ≤ 0: nearer to 0 than the dtype resolves, it stays at its largest."""
    a = mean_logprobs.clamp(max=-torch.finfo(mean_logprobs.dtype).eps)
    return a - torch.log(-torch.expm1(a))


def kto_loss(
    chosen: Tensor,
    rejected: Tensor,
    has_chosen: Tensor,
    has_rejected: Tensor,
    *,
    beta: float,
    kl: Tensor | float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Mean over a row's completions of λ_D·(1 − σ(β(Δ_w − z0))) and λ_U·(1 − σ(β(z0 − Δ_l))) (arXiv:2402.01306).

    z0 is `kl`, a scalar; λ_D and λ_U are the weights. A row need not have both completions, see the booleans
    `has_chosen` and `has_rejected`: an absent one adds nothing, and gets no gradient.
    """
    desirable = desirable_weight * torch.sigmoid(beta * (kl - chosen))
    undesirable = undesirable_weight * torch.sigmoid(beta * (rejected - kl))
    total = torch.where(has_chosen, desirable, 0.0) + torch.where(has_rejected, undesirable, 0.0)
    return total / (has_chosen.to(total) + has_rejected.to(total)).clamp(min=1)


def r_dpo_loss(h: Tensor, extra_tokens: Tensor, beta: float, length_penalty: float) -> Tensor:
    """−log σ(βh + α(|w| − |l|)) (arXiv:2403.19159), with `extra_tokens` = |w| − |l| and α = `length_penalty`."""
    return -F.logsigmoid(beta * h + length_penalty * extra_tokens)


def dpop_loss(h: Tensor, chosen: Tensor, beta: float, penalty_weight: float) -> Tensor:
    """−log σ(β(h − λ·max(0, −Δ_w))) (arXiv:2402.13228), with Δ_w = `chosen` and λ = `penalty_weight`."""
    return -F.logsigmoid(beta * (h - penalty_weight * F.relu(-chosen)))


def kl_estimate(mismatched_logratios: Tensor, weights: Tensor | None = None) -> Tensor:
    """KTO's z0 (arXiv:2402.01306 §4.1): max(0, mean), detached, of Δ [n] over the mismatched completions of the
    whole global batch, each by the weight of its row [n]. Raises ValueError when there is none."""
    if mismatched_logratios.numel() == 0:
        raise ValueError("There are no mismatched completions to estimate the KL term from.")
    ratios = mismatched_logratios.detach()
    mean = ratios.mean() if weights is None else (weights * ratios).sum() / weights.sum()
    return mean.clamp(min=0.0)


# g(Δ) of f-DPO, f′ at the density ratio (arXiv:2309.16240 table 1), less its value at 0, which no margin sees: so
# rewards are 0 where policy equals reference. That of the reverse KL is Δ itself.


def forward_kl_reward(logratios: Tensor) -> Tensor:
    """1 − e^(−Δ). The exponent ends at 80, and the reward is flat behind."""
    return -torch.expm1((-logratios).clamp(max=_LARGEST_EXPONENT))


def jensen_shannon_reward(logratios: Tensor) -> Tensor:
    """log σ(Δ) + log 2."""
    return F.logsigmoid(logratios) + math.log(2)


def alpha_divergence_reward(logratios: Tensor, alpha: float) -> Tensor:
    """(e^((α−1)Δ) − 1) / (α−1), with α ≠ 1. The exponent ends at 80, and the reward is flat behind."""
    return torch.expm1(((alpha - 1) * logratios).clamp(max=_LARGEST_EXPONENT)) / (alpha - 1)


def aot_margins(better: Tensor, worse: Tensor) -> Tensor:
    """Differences of quantiles (arXiv:2406.05882), in ascending order of them; not the margins of single pairs.

    Paired, of the policy's margins and the reference's; unpaired, of Δ_w and Δ_l.
    """
    return better.sort().values - worse.sort().values
