"""The options of each loss: the section `train.loss`, one class a type.

A loss has the options that it uses and no others, so an option without effect is an error, never ignored.
Symbols are those of dpo_ray.losses.formulas: Δ the log-ratio of a completion to the reference, h the margin Δ_w − Δ_l.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from dpo_ray.config.section import Section
from dpo_ray.errors import DataError

Judged = Literal["weight", "margin", "preference"]
"""Columns of how a pair was judged: how much it counts, the known gap of the rewards, P(chosen ≻ rejected)."""


class LossOptions(Section):
    """Base of the losses. The properties say what a loss needs from whoever trains with it."""

    type: str
    """Name of the loss."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference; without, no reference pass is needed."""
        return True

    @property
    def couples_batch(self) -> bool:
        """Whether the loss is a function of the log-probs of the whole global batch, not a mean over its pairs."""
        return False

    @property
    def accepts_unpaired(self) -> bool:
        """Whether a row may have only a chosen or only a rejected completion."""
        return False

    @property
    def needs_mismatched(self) -> bool:
        """Whether log-ratios of mismatched completions (the prompt of one pair, the completion of another) are used."""
        return False

    @property
    def tracks_reward_mean(self) -> bool:
        """Whether the running mean of the rewards of earlier steps is used."""
        return False

    @property
    def averages_tokens(self) -> bool:
        """Whether log-ratios are means over a completion's tokens instead of sums."""
        return False

    @property
    def token_tail_weight(self) -> float | None:
        """LD-DPO's α, the weight of a token behind the length that both completions share; None: all weigh the same."""
        return None

    @property
    def weights_by_policy(self) -> bool:
        """Whether pairs are weighted by how likely the policy is to sample them (WPO)."""
        return False

    @property
    def uses(self) -> frozenset[Judged]:
        """What the rows may say of a pair beside which answer is the better one."""
        return frozenset({"weight"})


class NLLTerm(LossOptions):
    nll_weight: float = Field(0.0, ge=0.0)
    """α of the added −α·log π(chosen)/|chosen| (arXiv:2404.19733): a mean per completion, then over the pairs, so
    that long completions do not outweigh short ones. A row without a chosen completion adds 0."""


class TailWeighting(LossOptions):
    ld_alpha: float | None = Field(None, ge=0.0, le=1.0)
    """LD-DPO's α (arXiv:2409.06411), the weight of tokens behind the length that both completions share; left out:
    not weighted, as with 1. Policy and reference alike, so that equal models keep a margin of 0."""

    @property
    def token_tail_weight(self) -> float | None:
        return self.ld_alpha


class PolicyWeighting(LossOptions):
    wpo: bool = False
    """Weight the loss of a pair by w(chosen)·w(rejected), how likely the policy is to sample it (WPO,
    arXiv:2406.11827): detached and not clamped. The NLL term is not weighted."""

    @property
    def weights_by_policy(self) -> bool:
        return self.wpo


class ReferenceFree(LossOptions):
    @property
    def needs_reference(self) -> bool:
        return False


class BatchCoupled(LossOptions):
    @property
    def couples_batch(self) -> bool:
        return True

    @property
    def uses(self) -> frozenset[Judged]:
        return frozenset()  # a value of the loss belongs to no pair


class ReverseKL(Section):
    type: Literal["reverse_kl"]
    """g(Δ) = Δ: DPO as published."""


class ForwardKL(Section):
    type: Literal["forward_kl"]
    """g(Δ) = −e^(−Δ)."""


class JensenShannon(Section):
    type: Literal["js"]
    """g(Δ) = log σ(Δ)."""


class AlphaDivergence(Section):
    type: Literal["alpha"]
    """g(Δ) = e^((α−1)Δ)/(α−1)."""
    alpha: float = Field(0.5, ge=0.0, lt=1.0)
    """0 is the forward KL; near 1 it is the reverse KL, and at 1 it is not defined. The paper's α is 1 − this one."""


Divergence = Annotated[ReverseKL | ForwardKL | JensenShannon | AlphaDivergence, Field(discriminator="type")]


class SigmoidLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["sigmoid"]
    """DPO (arXiv:2305.18290); with label_smoothing, conservative DPO."""
    beta: float = Field(0.1, gt=0.0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Assumed share of flipped labels."""
    divergence: Divergence = ReverseKL(type="reverse_kl")
    """What pulls the policy towards the reference (f-DPO, arXiv:2309.16240)."""

    @property
    def uses(self) -> frozenset[Judged]:
        return frozenset({"weight", "margin", "preference"})


class RobustLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["robust"]
    """Provably robust DPO (arXiv:2403.00409)."""
    beta: float = Field(0.1, gt=0.0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(0.1, ge=0.0, lt=0.5)
    """Assumed share of flipped labels."""


class HingeLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["hinge"]
    """Hinge on the margin, SLiC / RSO (arXiv:2305.10425, 2309.06657)."""
    beta: float = Field(0.1, gt=0.0)
    """Inverse of the margin at which a pair stops to count."""


class IPOLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["ipo"]
    """IPO (arXiv:2310.12036)."""
    beta: float = Field(0.1, gt=0.0)
    """The paper's τ: the regression target is 1/2β."""
    log_ratio: Literal["mean", "sum"] = "mean"
    """Log-ratio of a completion: the mean over its tokens, as the authors confirmed they meant, or the sum."""

    @property
    def averages_tokens(self) -> bool:
        return self.log_ratio == "mean"

    @property
    def uses(self) -> frozenset[Judged]:
        return frozenset({"weight", "preference"})

    @model_validator(mode="after")
    def _tail_of_sums(self) -> IPOLoss:
        if self.ld_alpha is not None and self.log_ratio == "mean":
            raise ValueError(
                f"ld_alpha={self.ld_alpha:g} weights tokens of a sum, but log_ratio is mean: set log_ratio to sum or "
                "leave ld_alpha out"
            )
        return self


class SigmoidNormLoss(NLLTerm, PolicyWeighting):
    type: Literal["sigmoid_norm"]
    """DPO on the mean log-ratio per token (Tulu 3, arXiv:2411.15124)."""
    beta: float = Field(5.0, gt=0.0)
    """Strength of the pull towards the reference; per-token ratios are small, so it is larger than DPO's."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Assumed share of flipped labels."""

    @property
    def averages_tokens(self) -> bool:
        return True

    @property
    def uses(self) -> frozenset[Judged]:
        return frozenset({"weight", "margin", "preference"})


class EXOPairLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["exo_pair"]
    """EXO on pairs (arXiv:2402.00856): the reverse KL to the smoothed label."""
    beta: float = Field(0.1, gt=0.0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(1e-3, gt=0.0, lt=0.5)
    """Assumed share of flipped labels; above 0, for at 0 the divergence is infinite."""


class NCAPairLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["nca_pair"]
    """NCA on pairs (arXiv:2402.05369): holds up the chosen completion's likelihood. Published with lr 5e-6."""
    beta: float = Field(0.01, gt=0.0)
    """Strength of the pull towards the reference."""


class BCOPairLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["bco_pair"]
    """BCO on pairs (arXiv:2404.04656): chosen and rejected told apart by a reward above or below δ, the running mean
    of the rewards of chosen and rejected over all pairs of the steps before this one (0 in the first). Published with
    lr 5e-7."""
    beta: float = Field(0.01, gt=0.0)
    """Strength of the pull towards the reference."""

    @property
    def tracks_reward_mean(self) -> bool:
        return True


class SPPOHardLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["sppo_hard"]
    """SPPO with hard labels (arXiv:2405.00675): regression of Δ to ±1/2β."""
    beta: float = Field(0.001, gt=0.0)
    """Strength of the pull towards the reference; the targets are ±1/2β."""


class AOTLoss(BatchCoupled, NLLTerm):
    type: Literal["aot"]
    """AOT (arXiv:2406.05882): the policy's margins, sorted over the global batch, against the reference's, sorted."""
    beta: float = Field(0.01, gt=0.0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Assumed share of flipped labels."""


class AOTUnpairedLoss(BatchCoupled, NLLTerm):
    type: Literal["aot_unpaired"]
    """AOT (arXiv:2406.05882): log-ratios of chosen, sorted over the global batch, against those of rejected, sorted;
    which of them were a pair does not matter, but there are as many of either."""
    beta: float = Field(0.01, gt=0.0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Assumed share of flipped labels."""


class APOZeroLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["apo_zero"]
    """APO-zero (arXiv:2408.06266), chosen up and rejected down: for chosen that are better than the policy's own.
    Published with lr 2e-7."""
    beta: float = Field(0.1, gt=0.0)
    """Strength of the pull towards the reference."""


class APODownLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["apo_down"]
    """APO-down (arXiv:2408.06266), both down, rejected more: for chosen that are worse than the policy's own.
    Published with lr 2e-7."""
    beta: float = Field(0.1, gt=0.0)
    """Strength of the pull towards the reference."""


class DiscoPOPLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["discopop"]
    """DiscoPOP (arXiv:2406.08414): between the logistic and the exponential loss, by the margin."""
    beta: float = Field(0.05, gt=0.0)
    """Strength of the pull towards the reference."""
    tau: float = Field(0.05, gt=0.0)
    """Temperature of the passage from the logistic loss (βh < 0) to the exponential one (βh > 0)."""


class SimPOLoss(ReferenceFree, NLLTerm):
    type: Literal["simpo"]
    """SimPO (arXiv:2405.14734), reference-free, on mean token log-probs."""
    beta: float = Field(2.0, gt=0.0)
    """Scale of the mean token log-probs; 2 to 10 published."""
    target_margin: float = Field(1.0, ge=0.0)
    """γ itself, in units of the reward, and not γ/β (which is 0 to 1 in the paper). A pair's own margin is added."""

    @property
    def averages_tokens(self) -> bool:
        return True

    @property
    def uses(self) -> frozenset[Judged]:
        return frozenset({"weight", "margin"})


class ORPOLoss(ReferenceFree):
    type: Literal["orpo"]
    """ORPO (arXiv:2403.07691), reference-free: the NLL of chosen (always, with weight 1) and the log odds ratio."""
    odds_ratio_weight: float = Field(0.1, gt=0.0)
    """The paper's λ."""

    @property
    def averages_tokens(self) -> bool:
        return True


class CPOLoss(ReferenceFree, NLLTerm):
    type: Literal["cpo"]
    """CPO (arXiv:2401.08417), reference-free, on summed log-probs."""
    beta: float = Field(0.1, gt=0.0)
    """Scale of the log-probs."""
    nll_weight: float = Field(1.0, ge=0.0)
    """α of the added −α·log π(chosen)/|chosen|: a mean per completion, then over the pairs."""


class KTOLoss(NLLTerm):
    type: Literal["kto"]
    """KTO (arXiv:2402.01306), for pairs and for single completions. A row's loss is the mean over its completions."""
    beta: float = Field(0.1, gt=0.0)
    """Strength of the pull towards the reference."""
    desirable_weight: float = Field(1.0, gt=0.0)
    """λ_D, the weight of chosen completions."""
    undesirable_weight: float = Field(1.0, gt=0.0)
    """λ_U, the weight of rejected completions."""

    @property
    def accepts_unpaired(self) -> bool:
        return True

    @property
    def needs_mismatched(self) -> bool:
        return True


class RDPOLoss(NLLTerm, PolicyWeighting):
    type: Literal["r_dpo"]
    """Length-regularised DPO (arXiv:2403.19159): DPO for the penalised reward r − α|y|."""
    beta: float = Field(0.1, gt=0.0)
    """Strength of the pull towards the reference."""
    length_penalty: float = Field(0.05, gt=0.0)
    """The paper's α, in units of the reward, a token; .05 to 1 published."""


class DPOPLoss(NLLTerm, TailWeighting, PolicyWeighting):
    type: Literal["dpop"]
    """DPO-Positive (arXiv:2402.13228): penalises a chosen completion that becomes less likely than it was."""
    beta: float = Field(0.1, gt=0.0)
    """Strength of the pull towards the reference."""
    penalty_weight: float = Field(50.0, gt=0.0)
    """The paper's λ; 5 to 500 published."""


_PlainLoss = (
    SigmoidLoss
    | RobustLoss
    | HingeLoss
    | IPOLoss
    | SigmoidNormLoss
    | EXOPairLoss
    | NCAPairLoss
    | BCOPairLoss
    | SPPOHardLoss
    | APOZeroLoss
    | APODownLoss
    | DiscoPOPLoss
    | SimPOLoss
    | ORPOLoss
    | CPOLoss
    | KTOLoss
    | RDPOLoss
    | DPOPLoss
)

PlainLoss = Annotated[_PlainLoss, Field(discriminator="type")]
"""A loss that may stand in a weighted sum."""


class WeightedTerm(Section):
    weight: float = Field(gt=0.0)
    """Factor of the loss in the sum."""
    loss: PlainLoss
    """Any loss but a weighted sum and those that couple the batch (aot, aot_unpaired)."""


class WeightedLoss(NLLTerm):
    type: Literal["weighted"]
    """A weighted sum of losses, such as MPO's .8 sigmoid + .2 bco_pair + 1 NLL (arXiv:2411.10442)."""
    terms: tuple[WeightedTerm, ...]
    """What is summed, at least one. A term may ask for wpo, for itself; not for ld_alpha, as all read the same sums."""

    @model_validator(mode="after")
    def _terms_agree(self) -> WeightedLoss:
        if not self.terms:
            raise ValueError(
                "terms is empty, but a weighted sum needs at least one: name some, as in [{weight: 0.8, loss: {type: "
                "sigmoid}}]"
            )
        for i, term in enumerate(self.terms):
            if term.loss.token_tail_weight is not None:
                raise ValueError(
                    f"terms[{i}].loss.ld_alpha={term.loss.token_tail_weight:g} would weight the log-probs of every "
                    "term: leave it out of a weighted sum"
                )
        if sum(term.loss.tracks_reward_mean for term in self.terms) > 1:
            raise ValueError("terms has bco_pair more than once, but there is one running mean: keep one of them")
        return self

    @property
    def rewarding(self) -> PlainLoss:
        """The term whose rewards are reported: bco_pair, as its δ is their mean, and otherwise the first."""
        return next((term.loss for term in self.terms if term.loss.tracks_reward_mean), self.terms[0].loss)

    @property
    def averages_tokens(self) -> bool:
        return self.rewarding.averages_tokens

    @property
    def needs_reference(self) -> bool:
        return any(term.loss.needs_reference for term in self.terms)

    @property
    def accepts_unpaired(self) -> bool:
        return all(term.loss.accepts_unpaired for term in self.terms)

    @property
    def needs_mismatched(self) -> bool:
        return any(term.loss.needs_mismatched for term in self.terms)

    @property
    def tracks_reward_mean(self) -> bool:
        return any(term.loss.tracks_reward_mean for term in self.terms)

    @property
    def weights_by_policy(self) -> bool:
        return any(term.loss.weights_by_policy for term in self.terms)

    @property
    def uses(self) -> frozenset[Judged]:
        """What all terms use: one that does not would take a pair for another than the rest."""
        return frozenset.intersection(*(term.loss.uses for term in self.terms))


Loss = Annotated[_PlainLoss | AOTLoss | AOTUnpairedLoss | WeightedLoss, Field(discriminator="type")]
"""Every loss, told apart by `type`."""


def require_use(loss: LossOptions, column: Judged, who: str) -> None:
    """Raises DataError where a loss does not use a column that says how pairs were judged.

    Args:
        who: has it, with the verb, at the beginning of the sentence.
    """
    if column not in loss.uses:
        raise DataError(
            f"{who} a {column} for each pair, and train.loss.type={loss.type} does not use it. Set train.loss.type to "
            f"one that does ({', '.join(losses_using(column))}), or have it left aside: data.ignore=[{column}]."
        )


def losses_using(column: Judged) -> list[str]:
    """Types of the losses that use a column, weighted sums left aside."""
    types = [(kind, get_args(kind.model_fields["type"].annotation)[0]) for kind in get_args(_PlainLoss)]
    return [name for kind, name in types if column in kind(type=name).uses]
