"""Every loss from its options: values worked out by hand for the golden pair of cases (β = .1 unless stated, so that
βh = .2), and what holds for all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_ray.losses.objective import BatchTerms, pair_loss, rewards, zero_margin_loss
from dpo_ray.losses.pair_logps import PairLogps, pair_logps
from tests.unit.losses.cases import (
    ALL_LOSSES,
    GOLDEN,
    SEQUENCES,
    f64,
    logistic,
    logps,
    loss,
    name,
    random_pairs,
    random_tokens,
    select,
    weighted,
)

UNCOUPLED = [options for options in ALL_LOSSES if not options.couples_batch]
COUPLED = [options for options in ALL_LOSSES if options.couples_batch]


@pytest.mark.parametrize(
    ("options", "value"),
    [
        # log(1 + e^-.2)
        (loss("sigmoid"), 0.598139),
        # .9 · .598139 + .1 · log(1 + e^.2) = .9 · .598139 + .1 · .798139
        (loss("sigmoid", label_smoothing=0.1), 0.618139),
        # (.9 · .598139 - .1 · .798139) / .8
        (loss("robust", label_smoothing=0.1), 0.573139),
        # 1 - .2
        (loss("hinge"), 0.8),
        # (1/5 + 1/8 - 5)² = 4.675²
        (loss("ipo"), 21.855625),
        # (2 - 5)²
        (loss("ipo", log_ratio="sum"), 9.0),
        # log(1 + e^-.0325), log(1 + e^-1.625)
        (loss("sigmoid_norm", beta=0.1), 0.677029),
        (loss("sigmoid_norm"), 0.179745),
        # σ(.2) = .549834: .549834 · (-.598139 - log .999) + .450166 · (-.798139 - log .001)
        (loss("exo_pair"), 2.422015),
        # log(1 + e^-.1) + ½ log(1 + e^.1) + ½ log(1 + e^-.1) = 1.5 · .644397 + .5 · .744397
        (loss("nca_pair", beta=0.1), 1.338793),
        # 2 · log(1 + e^-.1)
        (loss("bco_pair", beta=0.1), 1.288793),
        # (1 - 5)² + (-1 + 5)²
        (loss("sppo_hard", beta=0.1), 32.0),
        # A batch of 1 is conservative DPO.
        (loss("aot", beta=0.1, label_smoothing=0.1), 0.618139),
        (loss("aot_unpaired", beta=0.1, label_smoothing=0.1), 0.618139),
        # 1 - σ(.1) + σ(-.1) = 2 · .475021
        (loss("apo_zero"), 0.950042),
        # .524979 + 1 - .549834
        (loss("apo_down"), 0.975145),
        # m = σ(4) = .982014: .017986 · .598139 + .982014 · .818731
        (loss("discopop", beta=0.1), 0.814763),
        # g: -e^-1 + e^1 = 2.350402
        (loss("sigmoid", divergence={"type": "forward_kl"}), 0.582517),
        # log σ(1) - log σ(-1) = 1
        (loss("sigmoid", divergence={"type": "js"}), 0.644397),
        # (e^-.5 - e^.5) / -.5 = 2.084381
        (loss("sigmoid", divergence={"type": "alpha", "alpha": 0.5}), 0.594349),
        # log(1 + e^(2 · .25 + 1))
        (loss("simpo", beta=2, target_margin=1), 1.701413),
        # 2 + .1 · log(1 + e^(log odds of l - of w)); log odds -1.854587 and -1.559113
        (loss("orpo"), 2.085176),
        # log(1 + e^-.4), and 10 / 5 more
        (loss("cpo", nll_weight=0), 0.513015),
        (loss("cpo"), 2.513015),
        # 1 - σ(.1), for both
        (loss("kto"), 0.475021),
        # .2 + .05 · (5 - 8) = .05
        (loss("r_dpo", length_penalty=0.05), 0.668460),
        # .2 + .2 · (5 - 8) = -.4
        (loss("r_dpo", length_penalty=0.2), 0.913015),
        # The chosen completion has become more likely: no penalty.
        (loss("dpop", penalty_weight=5), 0.598139),
        (loss("sigmoid", nll_weight=1), 2.598139),
        (loss("sigmoid", nll_weight=0.2), 0.998139),
        # .8 · .598139 + .2 · 1.288793 + 2
        (weighted((0.8, {"type": "sigmoid"}), (0.2, {"type": "bco_pair", "beta": 0.1}), nll_weight=1), 2.736270),
    ],
    ids=name,
)
def test_golden_values(options: Any, value: float):
    assert pair_loss(options, GOLDEN).item() == pytest.approx(value, abs=5e-7)


ZERO_MARGIN: list[tuple[Any, float | None]] = [
    (loss("sigmoid", beta=0.7, label_smoothing=0.3), math.log(2)),
    (loss("sigmoid", divergence={"type": "forward_kl"}), math.log(2)),
    (loss("sigmoid", divergence={"type": "js"}), math.log(2)),
    (loss("sigmoid", divergence={"type": "alpha"}), math.log(2)),
    (loss("sigmoid", ld_alpha=0.3), math.log(2)),
    (loss("robust", beta=0.7), math.log(2)),
    (loss("hinge", beta=0.7), 1.0),
    (loss("ipo", beta=0.1), 25.0),  # (1 / .2)²
    (loss("ipo", beta=0.5, log_ratio="sum", ld_alpha=0.2), 1.0),  # (1 / 1)²
    (loss("sigmoid_norm"), math.log(2)),
    # ½ log(.5 / .9) + ½ log(.5 / .1) = -½ · .587787 + ½ · 1.609438
    (loss("exo_pair", label_smoothing=0.1), 0.5108256238),
    (loss("nca_pair"), 2 * math.log(2)),
    (loss("bco_pair"), 2 * math.log(2)),
    (loss("sppo_hard", beta=0.1), 50.0),  # 2 · 5²
    (loss("aot", label_smoothing=0.2), math.log(2)),
    (loss("aot_unpaired", label_smoothing=0.2), math.log(2)),
    (loss("apo_zero"), 1.0),
    (loss("apo_down"), 1.0),
    (loss("discopop"), 0.8465735903),  # ½ · log 2 + ½ · 1
    (loss("kto", desirable_weight=3, undesirable_weight=3), 1.5),
    (loss("dpop"), math.log(2)),
    # 2 · 1 + .5 · 25
    (weighted((2, {"type": "hinge"}), (0.5, {"type": "ipo", "beta": 0.1})), 14.5),
    (loss("kto", desirable_weight=2), None),
    (loss("r_dpo"), None),
    (loss("simpo"), None),
    (loss("orpo"), None),
    (loss("cpo"), None),
    (loss("sigmoid", nll_weight=0.1), None),
    (loss("sigmoid", wpo=True), None),
    (weighted((1, {"type": "sigmoid"}), nll_weight=0.1), None),
    (weighted((1, {"type": "sigmoid"}), (1, {"type": "r_dpo"})), None),
    (weighted((1, {"type": "sigmoid"}), (1, {"type": "simpo"})), None),
    (weighted((1, {"type": "sigmoid", "wpo": True})), None),
]


@pytest.mark.parametrize(("options", "value"), ZERO_MARGIN, ids=name)
def test_the_zero_margin_values_by_hand(options: Any, value: float | None):
    assert zero_margin_loss(options) == (None if value is None else pytest.approx(value, abs=1e-9))


def test_the_zero_margin_values_cover_every_loss():
    assert {options.type for options, _ in ZERO_MARGIN} == {options.type for options in ALL_LOSSES}


@pytest.mark.parametrize("options", [*ALL_LOSSES, *(options for options, _ in ZERO_MARGIN)], ids=name)
def test_each_loss_knows_its_value_where_policy_equals_reference(options: Any):
    tokens = random_tokens(0)
    equal = pair_logps(tokens, SEQUENCES, 4, ref_token_logprobs=tokens, ld_alpha=options.token_tail_weight)
    known = zero_margin_loss(options)
    if known is not None:
        assert pair_loss(options, equal).tolist() == pytest.approx([known] * 4, abs=1e-12)
        assert pair_loss(options, random_pairs()).mean().item() != pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize("options", [o for o in ALL_LOSSES if o.type != "apo_down"], ids=name)
def test_a_chosen_more_and_a_rejected_less_likely_cost_less_below_the_optimum(options: Any):
    # h = 2.4. With smoothing .2 and β = .5 the sigmoid loss is least at h = log(.8 / .2) / .5 = 2.77.
    better = logps((-9.8, -14.2), (-11, -13))
    assert pair_loss(options, better).item() < pair_loss(options, GOLDEN).item()


def test_only_losses_per_token_or_with_a_length_term_see_the_lengths():
    longer = logps((-10, -14), (-11, -13), (10, 18))
    seen = {o.type for o in ALL_LOSSES if pair_loss(o, longer).item() != pair_loss(o, GOLDEN).item()}
    # sigmoid and weighted by their NLL term.
    assert seen == {"ipo", "sigmoid_norm", "simpo", "orpo", "cpo", "r_dpo", "sigmoid", "weighted"}


@pytest.mark.parametrize("options", ALL_LOSSES, ids=name)
def test_a_loss_needs_the_reference_exactly_when_it_says_so(options: Any):
    without = pair_logps(random_tokens(0), SEQUENCES, 4)
    assert without.ref_chosen is None and without.ref_rejected is None
    if options.needs_reference:
        with pytest.raises(ValueError, match="no reference log-probs"):
            pair_loss(options, without)
    else:
        assert pair_loss(options, without).tolist() == pair_loss(options, random_pairs()).tolist()


@pytest.mark.parametrize("options", ALL_LOSSES, ids=name)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_in_float32_losses_and_gradients_stay_finite_however_large_the_margin(options: Any, size: float):
    signs = torch.tensor([[-1, -1, 1, 1], [-1, 1, -1, 1]], dtype=torch.float32) * size
    lengths = torch.full((4,), 5.0)
    policy = (-2 * size + signs).requires_grad_()
    reference = torch.full((4,), -2 * size)
    pairs = PairLogps(*policy, reference, reference, lengths, lengths, *policy / lengths)
    losses = pair_loss(options, pairs)
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    losses.sum().backward()
    assert policy.grad is not None and policy.grad.isfinite().all()


@pytest.mark.parametrize(
    "options", [*ALL_LOSSES, loss("sigmoid", ld_alpha=0.3), loss("dpop", penalty_weight=5, ld_alpha=0)], ids=name
)
def test_gradients_agree_with_finite_differences(options: Any):
    terms = BatchTerms(kl=0.2, reward_mean=0.05)

    def losses(tokens: Tensor) -> Tensor:
        reference = random_tokens(1)
        pairs = pair_logps(tokens, SEQUENCES, 4, ref_token_logprobs=reference, ld_alpha=options.token_tail_weight)
        return pair_loss(options, pairs, terms)

    tokens = random_tokens(0).requires_grad_()
    assert torch.autograd.gradcheck(losses, (tokens,))
    assert torch.autograd.grad(losses(tokens).sum(), tokens)[0].abs().max() > 0


@pytest.mark.parametrize("options", UNCOUPLED, ids=name)
def test_each_pair_of_a_batch_has_the_loss_it_has_alone(options: Any):
    pairs = random_pairs()
    expected = torch.cat([pair_loss(options, select(pairs, [i])) for i in range(4)])
    torch.testing.assert_close(pair_loss(options, pairs), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", ALL_LOSSES, ids=name)
def test_the_order_of_the_pairs_does_not_change_the_loss(options: Any):
    shuffled = select(random_pairs(), [2, 0, 3, 1])
    torch.testing.assert_close(
        pair_loss(options, shuffled).mean(), pair_loss(options, random_pairs()).mean(), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("options", COUPLED, ids=name)
def test_a_coupled_loss_is_that_of_the_batch_and_not_of_its_pairs(options: Any):
    pairs = random_pairs()
    # Other references, so that the reference does not order the pairs as the policy does.
    pairs = replace(pairs, ref_chosen=pairs.reference[0].flip(0), ref_rejected=pairs.reference[1].flip(0))
    alone = torch.cat([pair_loss(options, select(pairs, [i])) for i in range(4)])
    conservative = pair_loss(loss("sigmoid", beta=0.1, label_smoothing=0.1), pairs)
    torch.testing.assert_close(alone, conservative, rtol=0, atol=1e-14)
    assert pair_loss(options, pairs).mean().item() != pytest.approx(alone.mean().item(), abs=1e-6)


def test_the_nll_term_is_a_mean_per_completion():
    plain, with_nll = (pair_loss(loss("hinge", nll_weight=a), random_pairs()) for a in (0.0, 0.5))
    tokens = random_tokens(0)
    # The first tokens of the four chosen completions are 0, 8, 10 and 16; they have 3, 1, 4 and 2.
    nll = [-tokens[0:3].mean(), -tokens[8], -tokens[10:14].mean(), -tokens[16:18].mean()]
    torch.testing.assert_close(with_nll - plain, 0.5 * torch.stack(nll), rtol=0, atol=1e-14)


def test_an_absent_completion_gets_no_gradient_and_has_no_nll():
    tokens = f64(-1, -2, -4).requires_grad_()
    # A row with only a chosen, one with only a rejected completion.
    rows = pair_logps(tokens, torch.tensor([0, 0, 3]), 2, ref_token_logprobs=f64(-1.5, -2, -3))
    assert rows.num_chosen_tokens.tolist() == [2, 0] and rows.num_rejected_tokens.tolist() == [0, 1]
    assert rows.mean_chosen.tolist() == [-1.5, 0] and rows.mean_rejected.tolist() == [0, -4]
    options = loss("kto", nll_weight=1)
    losses = pair_loss(options, rows, BatchTerms(kl=0.3))
    # Δ = .5 and -1: 1 - σ(.1 · .2) + 1.5, and 1 - σ(.1 · 1.3) without NLL.
    assert losses.tolist() == pytest.approx([1 - logistic(0.02) + 1.5, 1 - logistic(0.13)], abs=1e-14)
    sides = [rows.policy_chosen, rows.policy_rejected]
    gradients = torch.autograd.grad(losses.sum(), sides)
    assert gradients[0][1] == 0 and gradients[1][0] == 0
    assert gradients[0][0] < 0 < gradients[1][1]
    assert [side.tolist() for side in rewards(options, rows)] == [[pytest.approx(0.05), 0], [0, pytest.approx(-0.1)]]


def test_a_weighted_sum_adds_its_terms_with_their_own_options():
    terms: list[tuple[float, dict[str, Any]]] = [
        (0.8, {"type": "sigmoid", "label_smoothing": 0.2}),
        (0.2, {"type": "bco_pair", "beta": 0.3}),
        (1.5, {"type": "cpo"}),
        (0.4, {"type": "kto"}),
    ]
    batch = BatchTerms(kl=0.4, reward_mean=0.2)
    alone = [weight * pair_loss(loss(**term), random_pairs(), batch) for weight, term in terms]
    torch.testing.assert_close(
        pair_loss(weighted(*terms), random_pairs(), batch), torch.stack(alone).sum(0), rtol=0, atol=1e-14
    )


def test_wpo_is_not_clamped_and_only_on_request():
    likely = replace(GOLDEN, policy_weight=f64(7.0))
    assert pair_loss(loss("hinge", wpo=True), likely).item() == pytest.approx(7 * 0.8, abs=1e-14)
    assert pair_loss(loss("hinge"), likely).item() == pytest.approx(0.8, abs=1e-14)


def test_a_term_of_a_weighted_sum_weights_itself():
    both = weighted((0.5, {"type": "hinge", "wpo": True}), (2, {"type": "hinge"}))
    likely = replace(GOLDEN, policy_weight=f64(7.0))
    assert pair_loss(both, likely).item() == pytest.approx(0.5 * 7 * 0.8 + 2 * 0.8, abs=1e-14)


@pytest.mark.parametrize("options", [loss("apo_zero", wpo=True), weighted((1, {"type": "apo_zero", "wpo": True}))])
def test_wpo_without_weights_says_what_is_missing(options: Any):
    with pytest.raises(ValueError, match="apo_zero loss with wpo needs policy_weight"):
        pair_loss(options, GOLDEN)
