"""Options → the loss of each pair of a batch, its rewards and its margins. Symbols are those of formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_ray.config.losses import (
    AlphaDivergence,
    AOTLoss,
    AOTUnpairedLoss,
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    CPOLoss,
    DiscoPOPLoss,
    Divergence,
    DPOPLoss,
    EXOPairLoss,
    ForwardKL,
    HingeLoss,
    IPOLoss,
    JensenShannon,
    KTOLoss,
    Loss,
    NCAPairLoss,
    NLLTerm,
    ORPOLoss,
    RDPOLoss,
    ReverseKL,
    RobustLoss,
    SigmoidLoss,
    SigmoidNormLoss,
    SimPOLoss,
    SPPOHardLoss,
    WeightedLoss,
)
from dpo_ray.losses.formulas import (
    alpha_divergence_reward,
    aot_margins,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    discopop_loss,
    dpop_loss,
    exo_pair_loss,
    forward_kl_reward,
    hinge_loss,
    ipo_loss,
    jensen_shannon_reward,
    kto_loss,
    log_odds,
    nca_pair_loss,
    orpo_loss,
    r_dpo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
    sppo_hard_loss,
)
from dpo_ray.losses.pair_logps import PairLogps


@dataclass(frozen=True)
class BatchTerms:
    """What a loss takes from the whole global batch or from earlier steps: detached scalars."""

    kl: Tensor | float = 0.0
    """KTO's z0, see kl_estimate."""
    reward_mean: Tensor | float = 0.0
    """BCO's δ: the mean of the rewards of chosen and rejected over all pairs of the steps before; 0 in the first."""


def pair_loss(options: Loss, logps: PairLogps, terms: BatchTerms = BatchTerms()) -> Tensor:
    """The configured loss of each pair, [B].

    Of a loss that couples the batch, `logps` must be those of the whole global batch, and only the mean of the
    result is meant: a value belongs to no pair. Margins and preferences enter a loss that uses them; weights do not.

    Raises ValueError when `logps` lacks the reference or the policy weights that the loss needs.
    """
    losses = _preference_loss(options, logps, terms)
    # A weighted sum has no weights of its own: each of its terms has weighted itself.
    if options.weights_by_policy and not isinstance(options, WeightedLoss):
        if logps.policy_weight is None:
            raise ValueError(
                f"The {options.type} loss with wpo needs policy_weight: pass log_collisions to pair_logps."
            )
        losses = losses * logps.policy_weight
    if isinstance(options, NLLTerm) and options.nll_weight > 0:
        losses = losses - options.nll_weight * logps.mean_chosen
    return losses


def _preference_loss(options: Loss, logps: PairLogps, terms: BatchTerms) -> Tensor:
    if isinstance(options, WeightedLoss):
        return torch.stack([term.weight * pair_loss(term.loss, logps, terms) for term in options.terms]).sum(0)
    # From the same values as the reported rewards, so that these show the margin that the loss sees.
    chosen, rejected = unscaled_rewards(options, logps)
    h = chosen - rejected
    margin = 0.0 if logps.margin is None else logps.margin
    preference = 1.0 if logps.preference is None else logps.preference
    match options:
        case SigmoidLoss() | SigmoidNormLoss():
            return sigmoid_loss(h, options.beta, options.label_smoothing, margin, preference)
        case CPOLoss():
            return sigmoid_loss(h, options.beta)
        case DPOPLoss():
            return dpop_loss(h, chosen, options.beta, options.penalty_weight)
        case RobustLoss():
            return robust_loss(h, options.beta, options.label_smoothing)
        case HingeLoss():
            return hinge_loss(h, options.beta)
        case IPOLoss():
            return ipo_loss(h, options.beta, preference)
        case EXOPairLoss():
            return exo_pair_loss(h, options.beta, options.label_smoothing)
        case NCAPairLoss():
            return nca_pair_loss(chosen, rejected, options.beta)
        case BCOPairLoss():
            return bco_pair_loss(chosen, rejected, options.beta, terms.reward_mean)
        case SPPOHardLoss():
            return sppo_hard_loss(chosen, rejected, options.beta)
        case AOTLoss():
            ref_chosen, ref_rejected = logps.reference
            margins = aot_margins(logps.policy_chosen - logps.policy_rejected, ref_chosen - ref_rejected)
            return sigmoid_loss(margins, options.beta, options.label_smoothing)
        case AOTUnpairedLoss():
            return sigmoid_loss(aot_margins(chosen, rejected), options.beta, options.label_smoothing)
        case APOZeroLoss():
            return apo_zero_loss(chosen, rejected, options.beta)
        case APODownLoss():
            return apo_down_loss(chosen, rejected, options.beta)
        case DiscoPOPLoss():
            return discopop_loss(h, options.beta, options.tau)
        case SimPOLoss():
            return simpo_loss(h, options.beta, options.target_margin, margin)
        case ORPOLoss():
            return orpo_loss(logps.mean_chosen, h, options.odds_ratio_weight)
        case KTOLoss():
            return kto_loss(
                chosen,
                rejected,
                logps.num_chosen_tokens > 0,
                logps.num_rejected_tokens > 0,
                beta=options.beta,
                kl=terms.kl,
                desirable_weight=options.desirable_weight,
                undesirable_weight=options.undesirable_weight,
            )
        case RDPOLoss():
            extra_tokens = logps.num_chosen_tokens - logps.num_rejected_tokens
            return r_dpo_loss(h, extra_tokens, options.beta, options.length_penalty)


def unscaled_rewards(options: Loss, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Rewards of chosen and rejected before the scale (beta), each [B], with gradient."""
    match options:
        case WeightedLoss():
            return unscaled_rewards(options.rewarding, logps)
        case SimPOLoss():
            return logps.mean_chosen, logps.mean_rejected
        case ORPOLoss():
            return log_odds(logps.mean_chosen), log_odds(logps.mean_rejected)
        case CPOLoss():
            return logps.policy_chosen, logps.policy_rejected
    chosen, rejected = logps.chosen_logratios, logps.rejected_logratios
    match options:
        case SigmoidLoss():
            return _divergence_reward(options.divergence, chosen), _divergence_reward(options.divergence, rejected)
        case SigmoidNormLoss() | IPOLoss(log_ratio="mean"):
            return chosen / logps.num_chosen_tokens, rejected / logps.num_rejected_tokens
    return chosen, rejected


def _divergence_reward(divergence: Divergence, logratios: Tensor) -> Tensor:
    match divergence:
        case ReverseKL():
            return logratios
        case ForwardKL():
            return forward_kl_reward(logratios)
        case JensenShannon():
            return jensen_shannon_reward(logratios)
        case AlphaDivergence(alpha=alpha):
            return alpha_divergence_reward(logratios, alpha)


def _scale(options: Loss) -> float:
    match options:
        case WeightedLoss():
            return _scale(options.rewarding)
        case ORPOLoss():
            return options.odds_ratio_weight
    return options.beta


def rewards(options: Loss, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Implicit rewards of chosen and rejected, detached, such that their difference is the margin the loss sees.

    β·Δ for most; per-token means for sigmoid_norm, IPO on means and SimPO; β·Δ + α|y| for r_dpo. A reward belongs to
    a completion, whichever side it is on, so that of dpop is without the penalty on the chosen side. The sorted
    losses (aot) see the same rewards in another pairing. An absent completion has reward 0. A weighted sum has the
    rewards of one of its terms, see WeightedLoss.rewarding.
    """
    scale = _scale(options)
    chosen, rejected = (scale * values.detach() for values in unscaled_rewards(options, logps))
    source = options.rewarding if isinstance(options, WeightedLoss) else options
    if isinstance(source, RDPOLoss):
        chosen = chosen + source.length_penalty * logps.num_chosen_tokens
        rejected = rejected + source.length_penalty * logps.num_rejected_tokens
    return chosen, rejected


def preference_margins(options: Loss, logps: PairLogps) -> Tensor:
    """Reward of chosen less that of rejected, detached and without the scale β: comparable between runs with
    different β. For r_dpo without the length term too, whose size against h depends on β."""
    chosen, rejected = unscaled_rewards(options, logps)
    return (chosen - rejected).detach()


def zero_margin_loss(options: Loss) -> float | None:
    """What the loss of every pair is while policy equals reference, before the first step (BatchTerms of 0).

    None where that depends on the pairs: without a reference, with an NLL term, policy weights or length penalty,
    and for KTO with λ_D ≠ λ_U, where it depends on which completions a row has.
    """
    if not options.needs_reference or options.weights_by_policy:
        return None
    if isinstance(options, NLLTerm) and options.nll_weight > 0:
        return None
    match options:
        case HingeLoss() | APOZeroLoss() | APODownLoss():
            return 1.0
        case IPOLoss():
            return 1 / (4 * options.beta**2)
        case SPPOHardLoss():
            return 1 / (2 * options.beta**2)
        case EXOPairLoss():
            epsilon = options.label_smoothing
            return -math.log(2) - 0.5 * (math.log1p(-epsilon) + math.log(epsilon))
        case NCAPairLoss() | BCOPairLoss():
            return 2 * math.log(2)
        case DiscoPOPLoss():
            return 0.5 * math.log(2) + 0.5
        case KTOLoss():
            return options.desirable_weight / 2 if options.desirable_weight == options.undesirable_weight else None
        case RDPOLoss():
            return None
        case WeightedLoss():
            values = [zero_margin_loss(term.loss) for term in options.terms]
            known = [
                term.weight * value for term, value in zip(options.terms, values, strict=True) if value is not None
            ]
            return sum(known) if len(known) == len(values) else None
    return math.log(2)
