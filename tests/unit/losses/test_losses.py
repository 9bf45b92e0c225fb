"""The losses against values worked out by hand, in float64.

Golden pair: log-probs under the policy (-10, -14) and the reference (-11, -13), 5 and 8 tokens; so the log-ratios
are 1 and -1, h = 2 and the mean token log-probs -2 and -1.75. β = .1 unless stated, so that βh = .2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from dpo_ray.config.losses import Loss
from dpo_ray.losses.formulas import (
    alpha_divergence_reward,
    hinge_loss,
    ipo_loss,
    kl_estimate,
    log_odds,
    robust_loss,
    sigmoid_loss,
)
from dpo_ray.losses.objective import BatchTerms, pair_loss, preference_margins, rewards, zero_margin_loss
from dpo_ray.losses.pair_logps import PairLogps, pair_logps, sum_by_sequence

_LOSS: TypeAdapter[Any] = TypeAdapter(Loss)


def loss(type: str, **options: Any) -> Any:
    return _LOSS.validate_python({"type": type, **options})


def weighted(*terms: tuple[float, dict[str, Any]], **options: Any) -> Any:
    return loss("weighted", terms=[{"weight": weight, "loss": term} for weight, term in terms], **options)


ALL_LOSSES: list[Any] = [
    loss("sigmoid"),
    loss("sigmoid", beta=0.5, label_smoothing=0.2),
    loss("sigmoid", nll_weight=0.2),
    loss("sigmoid", divergence={"type": "forward_kl"}),
    loss("sigmoid", divergence={"type": "js"}),
    loss("sigmoid", divergence={"type": "alpha", "alpha": 0.3}),
    loss("robust"),
    loss("hinge", beta=0.3),
    loss("ipo", beta=0.2),
    loss("ipo", beta=0.2, log_ratio="sum"),
    loss("sigmoid_norm"),
    loss("exo_pair"),
    loss("nca_pair"),
    loss("bco_pair", beta=0.1),
    loss("sppo_hard", beta=0.1),
    loss("aot", beta=0.1, label_smoothing=0.1),
    loss("aot_unpaired", beta=0.1, label_smoothing=0.1),
    loss("apo_zero"),
    loss("apo_down"),
    loss("discopop"),
    loss("simpo"),
    loss("orpo"),
    loss("cpo"),
    loss("kto", desirable_weight=1.5),
    loss("kto"),
    loss("r_dpo"),
    loss("dpop", penalty_weight=5),
    weighted((0.8, {"type": "sigmoid"}), (0.2, {"type": "bco_pair"}), nll_weight=1),
    weighted((2, {"type": "hinge"}), (0.5, {"type": "apo_zero"})),
]
UNCOUPLED = [options for options in ALL_LOSSES if not options.couples_batch]
COUPLED = [options for options in ALL_LOSSES if options.couples_batch]


def name(value: Any) -> str:
    return str(getattr(value, "type", ""))


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logps(policy: tuple[float, float], reference: tuple[float, float], tokens: tuple[int, int] = (5, 8)) -> PairLogps:
    return PairLogps(
        f64(policy[0]),
        f64(policy[1]),
        f64(reference[0]),
        f64(reference[1]),
        f64(tokens[0]),
        f64(tokens[1]),
        f64(policy[0] / tokens[0] if tokens[0] else 0),
        f64(policy[1] / tokens[1] if tokens[1] else 0),
    )


GOLDEN = logps((-10, -14), (-11, -13))


def swapped(pairs: PairLogps) -> PairLogps:
    return PairLogps(
        pairs.policy_rejected,
        pairs.policy_chosen,
        pairs.ref_rejected,
        pairs.ref_chosen,
        pairs.num_rejected_tokens,
        pairs.num_chosen_tokens,
        pairs.mean_rejected,
        pairs.mean_chosen,
    )


# Four pairs: 3 and 5, 1 and 1, 4 and 2, 2 and 6 tokens.
LENGTHS = [3, 5, 1, 1, 4, 2, 2, 6]
SEQUENCES = torch.repeat_interleave(torch.arange(8), torch.tensor(LENGTHS))


def random_tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(len(SEQUENCES), generator=generator, dtype=torch.float64) - 0.1


def random_pairs(**options: Any) -> PairLogps:
    return pair_logps(random_tokens(0), SEQUENCES, 4, ref_token_logprobs=random_tokens(1), **options)


def select(pairs: PairLogps, index: list[int]) -> PairLogps:
    values = {field: value[index] for field, value in vars(pairs).items() if value is not None}
    return replace(pairs, **values)


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


def test_every_loss_of_the_configuration_is_tested_here():
    tags = _LOSS.json_schema()["discriminator"]["mapping"]
    assert set(tags) == {options.type for options in ALL_LOSSES} == {*LOSS_OF_REWARDS, "weighted"}


def test_the_margin_is_the_difference_of_the_log_ratios():
    assert GOLDEN.chosen_logratios.item() == -10 - -11 == 1
    assert GOLDEN.rejected_logratios.item() == -14 - -13 == -1
    assert GOLDEN.margins.item() == 1 - -1 == 2


@pytest.mark.parametrize("options", ALL_LOSSES, ids=name)
def test_swapping_a_pair_negates_its_margins(options: Any):
    pairs = random_pairs()
    assert pairs.margins.abs().min() > 0
    torch.testing.assert_close(swapped(pairs).margins, -pairs.margins, rtol=0, atol=0)
    before, after = preference_margins(options, pairs), preference_margins(options, swapped(pairs))
    assert before.abs().min() > 0
    torch.testing.assert_close(after, -before, rtol=0, atol=1e-14)
    chosen, rejected = rewards(options, pairs)
    torch.testing.assert_close(rewards(options, swapped(pairs)), (rejected, chosen), rtol=0, atol=0)


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


@pytest.mark.parametrize("options", [o for o in ALL_LOSSES if o.needs_reference and o.type != "r_dpo"], ids=name)
def test_rewards_are_0_where_policy_equals_reference(options: Any):
    equal = pair_logps(random_tokens(0), SEQUENCES, 4, ref_token_logprobs=random_tokens(0))
    assert rewards(options, equal)[0].tolist() == rewards(options, equal)[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("options", [o for o in ALL_LOSSES if o.type != "apo_down"], ids=name)
def test_a_chosen_more_and_a_rejected_less_likely_cost_less_below_the_optimum(options: Any):
    # h = 2.4. With smoothing .2 and β = .5 the sigmoid loss is least at h = log(.8 / .2) / .5 = 2.77.
    better = logps((-9.8, -14.2), (-11, -13))
    assert pair_loss(options, better).item() < pair_loss(options, GOLDEN).item()


def test_apo_down_pushes_both_down_and_rejected_more():
    pushed = {side: f64(-10.0).requires_grad_() for side in ("policy_chosen", "policy_rejected")}
    equal = replace(logps((-10, -10), (-10, -10)), **pushed)
    pair_loss(loss("apo_down"), equal).backward()
    # β·σ'(0) · (1 - 1) and β·σ'(0): at the start nothing for chosen, .1 · ¼ for rejected.
    assert pushed["policy_chosen"].grad == pytest.approx(0.0, abs=1e-15)
    assert pushed["policy_rejected"].grad == pytest.approx(0.025, abs=1e-15)


@pytest.mark.parametrize("beta", [0.05, 0.1, 5.0])
def test_swapping_a_pair_changes_the_sigmoid_loss_by_beta_h(beta: float):
    h = f64(-30.0, -2.0, -0.1, 0.0, 0.5, 3.0, 40.0)
    torch.testing.assert_close(sigmoid_loss(h, beta) - sigmoid_loss(-h, beta), -beta * h, rtol=0, atol=1e-12)


def test_without_smoothing_conservative_and_robust_are_plain_dpo():
    h = f64(-3.0, 0.0, 0.5, 20.0)
    plain = torch.log1p(torch.exp(-0.1 * h))
    torch.testing.assert_close(sigmoid_loss(h, 0.1, 0.0), plain, rtol=0, atol=1e-14)
    torch.testing.assert_close(robust_loss(h, 0.1, 0.0), plain, rtol=0, atol=1e-14)


def test_labels_flipped_half_the_time_leave_no_preference():
    # At ε = 1/2 the conservative loss is even in h.
    h = f64(0.3, 2.0, 17.0)
    torch.testing.assert_close(sigmoid_loss(h, 0.1, 0.5), sigmoid_loss(-h, 0.1, 0.5), rtol=0, atol=1e-14)


def test_the_robust_loss_is_unbiased_under_flips():
    # E over flips: (1-ε)·robust(h) + ε·robust(-h) = plain(h).
    h, epsilon = f64(-2.0, 0.4, 5.0), 0.2
    expected = (1 - epsilon) * robust_loss(h, 0.1, epsilon) + epsilon * robust_loss(-h, 0.1, epsilon)
    torch.testing.assert_close(expected, sigmoid_loss(h, 0.1), rtol=0, atol=1e-14)


def test_the_hinge_stops_to_count_at_one_over_beta():
    assert hinge_loss(f64(9.0, 10.0, 11.0), 0.1).tolist() == pytest.approx([0.1, 0.0, 0.0], abs=1e-12)


def test_the_ipo_loss_is_least_at_its_target():
    # 1 / (2 · .1) = 5
    assert ipo_loss(f64(5.0, 6.0, 4.0), 0.1).tolist() == [0.0, 1.0, 1.0]


def test_exo_is_0_where_the_policy_agrees_with_the_smoothed_label():
    # σ(βh) = 1 - ε at βh = log(.9 / .1)
    at_label = logps((-10 + math.log(9) / 0.1, -10), (-10, -10))
    assert pair_loss(loss("exo_pair", label_smoothing=0.1), at_label).item() == pytest.approx(0.0, abs=1e-12)


def test_bco_tells_completions_apart_at_the_running_mean():
    # β = .1: -log σ(.1 - .3) - log σ(-(-.1 - .3)) = log(1 + e^.2) + log(1 + e^-.4) = .798139 + .513015
    value = pair_loss(loss("bco_pair", beta=0.1), GOLDEN, BatchTerms(reward_mean=0.3)).item()
    assert value == pytest.approx(1.311154, abs=5e-7)


def test_dpop_penalises_a_chosen_completion_that_became_less_likely():
    # Δ_w = -1, Δ_l = -3, h = 2: -log σ(.1 · (2 - 5 · 1)) = log(1 + e^.3)
    worse = logps((-12, -16), (-11, -13))
    assert pair_loss(loss("dpop", penalty_weight=5), worse).item() == pytest.approx(0.854355, abs=5e-7)


@pytest.mark.parametrize("alpha", [0.999, 0.9999999])
def test_an_alpha_divergence_near_1_is_plain_dpo(alpha: float):
    near = loss("sigmoid", divergence={"type": "alpha", "alpha": alpha})
    torch.testing.assert_close(
        pair_loss(near, random_pairs()), pair_loss(loss("sigmoid"), random_pairs()), rtol=0, atol=2 * (1 - alpha)
    )


def test_an_alpha_divergence_near_1_keeps_float32_precision():
    # e^((α-1)Δ) / (α-1) alone would be near -1e6, where float32 resolves .06.
    reward = alpha_divergence_reward(torch.tensor([2.0, -3.0]), 1 - 1e-6)
    assert reward.tolist() == pytest.approx([2.0, -3.0], rel=1e-5)


def test_the_alpha_divergence_at_0_is_the_forward_kl():
    options = [loss("sigmoid", divergence=d) for d in ({"type": "alpha", "alpha": 0}, {"type": "forward_kl"})]
    torch.testing.assert_close(*(pair_loss(o, random_pairs()) for o in options), rtol=0, atol=1e-15)


def test_discopop_is_logistic_for_wrong_and_exponential_for_right_pairs():
    wrong, right = logps((-40, -10), (-10, -10)), logps((-10, -40), (-10, -10))
    options = loss("discopop", beta=0.1)
    assert pair_loss(options, wrong).item() == pytest.approx(math.log1p(math.exp(3)), abs=1e-12)
    assert pair_loss(options, right).item() == pytest.approx(math.exp(-3), abs=1e-12)


def test_only_losses_per_token_or_with_a_length_term_see_the_lengths():
    longer = logps((-10, -14), (-11, -13), (10, 18))
    seen = {o.type for o in ALL_LOSSES if pair_loss(o, longer).item() != pair_loss(o, GOLDEN).item()}
    # sigmoid and weighted by their NLL term.
    assert seen == {"ipo", "sigmoid_norm", "simpo", "orpo", "cpo", "r_dpo", "sigmoid", "weighted"}


def test_the_nll_term_is_a_mean_per_completion():
    plain, with_nll = (pair_loss(loss("hinge", nll_weight=a), random_pairs()) for a in (0.0, 0.5))
    tokens = random_tokens(0)
    # The first tokens of the four chosen completions are 0, 8, 10 and 16; they have 3, 1, 4 and 2.
    nll = [-tokens[0:3].mean(), -tokens[8], -tokens[10:14].mean(), -tokens[16:18].mean()]
    torch.testing.assert_close(with_nll - plain, 0.5 * torch.stack(nll), rtol=0, atol=1e-14)


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


def test_extreme_margins_keep_their_gradients():
    h = f64(-1e6, 1e6).requires_grad_()
    losses = sigmoid_loss(h, 0.1, 0.1)
    # -.9·logσ(∓1e5) - .1·logσ(±1e5) = .9e5 and .1e5
    assert losses.tolist() == pytest.approx([9e4, 1e4], rel=1e-12)
    losses.sum().backward()
    assert h.grad is not None and h.grad.tolist() == pytest.approx([-0.09, 0.01], abs=1e-12)


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


def test_the_gradient_of_dpo_is_beta_times_the_weight_of_the_pair():
    # d/dπ(chosen) of -logσ(βh) is -β·σ(-βh): -.1 · σ(-.2) = -.1 · .450166; the opposite for rejected.
    chosen, rejected = f64(-10.0).requires_grad_(), f64(-14.0).requires_grad_()
    pair_loss(loss("sigmoid"), replace(GOLDEN, policy_chosen=chosen, policy_rejected=rejected)).backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.0450166, abs=5e-8)
    assert rejected.grad.item() == pytest.approx(0.0450166, abs=5e-8)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


# Each loss as a function of its rewards w and r (and the mean log-prob of chosen), with the defaults of `loss(type)`.
LOSS_OF_REWARDS: dict[str, Callable[[float, float, float], float]] = {
    "sigmoid": lambda w, r, _: softplus(r - w),
    "robust": lambda w, r, _: (0.9 * softplus(r - w) - 0.1 * softplus(w - r)) / 0.8,
    "hinge": lambda w, r, _: max(0.0, 1 - (w - r)),
    "ipo": lambda w, r, _: ((w - r) / 0.1 - 5) ** 2,
    "sigmoid_norm": lambda w, r, _: softplus(r - w),
    "exo_pair": lambda w, r, _: (
        logistic(w - r) * math.log(logistic(w - r) / 0.999) + logistic(r - w) * math.log(logistic(r - w) / 0.001)
    ),
    "nca_pair": lambda w, r, _: softplus(-w) + 0.5 * softplus(w) + 0.5 * softplus(r),
    "bco_pair": lambda w, r, _: softplus(-w) + softplus(r),
    "sppo_hard": lambda w, r, _: (w / 0.001 - 500) ** 2 + (r / 0.001 + 500) ** 2,
    "aot": lambda w, r, _: softplus(r - w),
    "aot_unpaired": lambda w, r, _: softplus(r - w),
    "apo_zero": lambda w, r, _: 1 - logistic(w) + logistic(r),
    "apo_down": lambda w, r, _: logistic(w) + 1 - logistic(w - r),
    "discopop": lambda w, r, _: (
        (1 - logistic((w - r) / 0.05)) * softplus(r - w) + logistic((w - r) / 0.05) * math.exp(r - w)
    ),
    "simpo": lambda w, r, _: softplus(r - w + 1),
    "orpo": lambda w, r, a: -a + 0.1 * softplus((r - w) / 0.1),
    "cpo": lambda w, r, a: softplus(r - w) - a,
    "kto": lambda w, r, _: (1 - logistic(w) + 1 - logistic(-r)) / 2,
    "r_dpo": lambda w, r, _: softplus(r - w),
    "dpop": lambda w, r, _: softplus(r - w + 50 * max(0.0, -w)),
}


@pytest.mark.parametrize("type", LOSS_OF_REWARDS)
def test_the_loss_sees_the_rewards_that_are_reported(type: str):
    for i in range(4):
        pair = select(random_pairs(), [i])
        chosen, rejected = rewards(loss(type), pair)
        expected = LOSS_OF_REWARDS[type](chosen.item(), rejected.item(), pair.mean_chosen.item())
        assert pair_loss(loss(type), pair).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_the_sigmoid_loss_sees_the_rewards_of_its_divergence(divergence: str):
    options = loss("sigmoid", divergence={"type": divergence})
    chosen, rejected = rewards(options, random_pairs())
    torch.testing.assert_close(pair_loss(options, random_pairs()), sigmoid_loss(chosen - rejected, 1.0))
    assert rewards(loss("sigmoid"), random_pairs())[0].tolist() != pytest.approx(chosen.tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (loss("sigmoid", beta=0.3), (0.3, -0.3)),
        (loss("ipo"), (0.1 / 5, -0.1 / 8)),
        (loss("ipo", log_ratio="sum"), (0.1, -0.1)),
        (loss("sigmoid_norm"), (1.0, -0.625)),
        (loss("simpo"), (-4.0, -3.5)),
        (loss("cpo"), (-1.0, -1.4)),
        # a - log(1 - e^a): -2 + .145413 and -1.75 + .190887
        (loss("orpo"), (-0.1854587, -0.1559113)),
        (loss("r_dpo"), (0.1 + 0.25, -0.1 + 0.4)),
        # Rewards of the BCO term, whose mean is δ.
        (weighted((1, {"type": "sigmoid"}), (1, {"type": "bco_pair", "beta": 0.2})), (0.2, -0.2)),
        (weighted((1, {"type": "simpo"}), (1, {"type": "sigmoid"})), (-4.0, -3.5)),
    ],
    ids=name,
)
def test_rewards_by_hand(options: Any, expected: tuple[float, float]):
    chosen, rejected = rewards(options, GOLDEN)
    assert (chosen.item(), rejected.item()) == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize("options", ALL_LOSSES, ids=name)
def test_rewards_and_margins_carry_no_gradient(options: Any):
    tokens = random_tokens(0).requires_grad_()
    pairs = pair_logps(tokens, SEQUENCES, 4, ref_token_logprobs=random_tokens(1))
    assert pair_loss(options, pairs).requires_grad
    assert not any(values.requires_grad for values in (*rewards(options, pairs), preference_margins(options, pairs)))


@pytest.mark.parametrize("type", [type for type in LOSS_OF_REWARDS if type != "orpo"])
def test_preference_margins_do_not_depend_on_beta(type: str):
    small, large = (preference_margins(loss(type, beta=beta), random_pairs()) for beta in (0.1, 3.0))
    assert small.tolist() == large.tolist()
    chosen, rejected = rewards(loss(type, beta=3.0), random_pairs())
    if type != "r_dpo":  # whose reward has a term of length
        torch.testing.assert_close(chosen - rejected, 3 * small, rtol=0, atol=1e-13)


def test_the_preference_margin_of_orpo_is_the_log_odds_ratio():
    # -1.854587 + 1.559113
    for weight in (0.1, 1.0):
        margin = preference_margins(loss("orpo", odds_ratio_weight=weight), GOLDEN).item()
        assert margin == pytest.approx(-0.295473, abs=5e-7)


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


def test_aot_compares_sorted_margins_with_sorted_margins_and_ratios_with_ratios():
    tokens = f64(5, 5)
    pairs = PairLogps(
        f64(-6, -9), f64(-10, -10), f64(-9, -8), f64(-9, -10), tokens, tokens, f64(-6, -9) / 5, f64(-2, -2)
    )
    # Policy margins 4 and 1, reference margins 0 and 2: 1 - 0 and 4 - 2.
    values = pair_loss(loss("aot", beta=0.5), pairs)
    assert values.tolist() == pytest.approx([math.log1p(math.exp(-0.5)), math.log1p(math.exp(-1))], abs=1e-14)
    # Log-ratios 3 and -1 of chosen, -1 and 0 of rejected: -1 - -1 and 3 - 0.
    values = pair_loss(loss("aot_unpaired", beta=0.5), pairs)
    assert values.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-1.5))], abs=1e-14)


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_kto_takes_pairs_and_single_completions(kl: float):
    options, terms = loss("kto", desirable_weight=2, undesirable_weight=3), BatchTerms(kl=kl)
    # β = .1, Δ = 1 and -1: 2 · (1 - σ(.1 · (1 - z0))) and 3 · (1 - σ(.1 · (z0 + 1)))
    desirable, undesirable = 2 / (1 + math.exp(0.1 * (1 - kl))), 3 / (1 + math.exp(0.1 * (kl + 1)))
    for tokens, expected in [
        ((5, 0), desirable),
        ((0, 8), undesirable),
        ((5, 8), (desirable + undesirable) / 2),
    ]:
        row = logps((-10, -14), (-11, -13), tokens)
        assert pair_loss(options, row, terms).item() == pytest.approx(expected, abs=1e-14)


def test_the_golden_value_of_kto_holds_for_each_side():
    for tokens in ((5, 0), (0, 8)):
        row = logps((-10, -14), (-11, -13), tokens)
        assert pair_loss(loss("kto"), row).item() == pytest.approx(0.475021, abs=5e-7)


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


def test_the_kl_estimate_is_a_mean_that_is_never_negative():
    ratios = f64(1.0, -0.5, 2.5).requires_grad_()
    assert kl_estimate(ratios).item() == 1.0
    assert not kl_estimate(ratios).requires_grad
    assert kl_estimate(f64(1.0, -3.0)).item() == 0.0
    with pytest.raises(ValueError, match="mismatched"):
        kl_estimate(f64())


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


def test_orpo_is_stable_where_a_completion_is_nearly_certain():
    for dtype, nearest in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        mean = torch.tensor([-nearest, -1e-30, 0.0], dtype=dtype, requires_grad=True)
        odds = log_odds(mean)
        # log odds of e^a → -log(-a)
        assert odds[0].item() == pytest.approx(-math.log(nearest), rel=1e-6)
        assert odds.isfinite().all() and odds[1] >= odds[0]
        for side, other in ((0, 1), (1, 0)):
            means = [mean, torch.full_like(mean, -2.0)]
            mean.grad = None
            count = torch.ones_like(mean)
            pair_loss(
                loss("orpo"), PairLogps(mean, mean, None, None, count, count, means[side], means[other])
            ).sum().backward()
            assert mean.grad is not None and mean.grad.isfinite().all()


def test_log_odds_by_hand():
    # p = 1/2, 1/4, e^-50: log 1, log 1/3, and -50 for so small a p
    odds = log_odds(f64(math.log(0.5), math.log(0.25), -50.0, -1e4))
    assert odds.tolist() == pytest.approx([0.0, -math.log(3), -50.0, -1e4], abs=1e-14)
    assert torch.autograd.gradcheck(log_odds, (f64(-1e-3, -0.1, -3.0, -40.0).requires_grad_(),))


@pytest.mark.parametrize("options", ALL_LOSSES, ids=name)
def test_a_loss_needs_the_reference_exactly_when_it_says_so(options: Any):
    without = pair_logps(random_tokens(0), SEQUENCES, 4)
    assert without.ref_chosen is None and without.ref_rejected is None
    if options.needs_reference:
        with pytest.raises(ValueError, match="no reference log-probs"):
            pair_loss(options, without)
    else:
        assert pair_loss(options, without).tolist() == pair_loss(options, random_pairs()).tolist()


def test_token_logprobs_are_summed_and_averaged_by_completion():
    pairs = pair_logps(
        f64(-1, -2, -4, -8, -16, -32),
        torch.tensor([0, 0, 1, 2, 3, 3]),
        2,
        ref_token_logprobs=f64(-1, -1, -1, -2, -3, -3),
    )
    assert pairs.policy_chosen.tolist() == [-3, -8] and pairs.policy_rejected.tolist() == [-4, -48]
    assert pairs.reference[0].tolist() == [-2, -2] and pairs.reference[1].tolist() == [-1, -6]
    assert pairs.num_chosen_tokens.tolist() == [2, 1] and pairs.num_rejected_tokens.tolist() == [1, 2]
    assert pairs.mean_chosen.tolist() == [-1.5, -8] and pairs.mean_rejected.tolist() == [-4, -24]
    assert pairs.policy_weight is None


def test_ld_dpo_weights_the_tail_of_the_longer_completion_under_policy_and_reference():
    # Two tokens against four, then three against one.
    sequences = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 3])
    policy = f64(-1, -2, -1, -3, -5, -7, -2, -4, -8, -3)
    reference = f64(-2, -2, -1, -1, -4, -8, -1, -8, -4, -2)
    pairs = pair_logps(policy, sequences, 2, ref_token_logprobs=reference, ld_alpha=0.25)
    # -1 - 2; -1 - 3 + ¼ · (-5 - 7); -2 + ¼ · (-4 - 8); -3
    assert pairs.policy_chosen.tolist() == [-3, -5] and pairs.policy_rejected.tolist() == [-7, -3]
    assert pairs.reference[0].tolist() == [-4, -4] and pairs.reference[1].tolist() == [-5, -2]
    # Means and counts stay those of the whole completions.
    assert pairs.mean_chosen.tolist() == pytest.approx([-1.5, -14 / 3]) and pairs.mean_rejected.tolist() == [-4, -3]
    assert pairs.num_rejected_tokens.tolist() == [4, 1]
    # α = 0: only the shared length.
    shared = pair_logps(policy, sequences, 2, ref_token_logprobs=reference, ld_alpha=0.0)
    assert shared.policy_rejected.tolist() == [-4, -3] and shared.policy_chosen.tolist() == [-3, -2]


def test_ld_dpo_with_weight_1_is_plain_summing():
    plain, weighted_tail = random_pairs(), random_pairs(ld_alpha=1.0)
    for field, value in vars(plain).items():
        if value is not None:
            assert getattr(weighted_tail, field).tolist() == value.tolist()
    assert random_pairs(ld_alpha=0.5).margins.tolist() != plain.margins.tolist()


def test_policy_and_reference_that_are_equal_have_log_ratios_of_exactly_0():
    for dtype in (torch.float32, torch.float64):
        tokens = random_tokens(0).to(dtype)
        pairs = pair_logps(tokens, SEQUENCES, 4, ref_token_logprobs=tokens.double(), ld_alpha=0.3)
        assert pairs.chosen_logratios.tolist() == pairs.rejected_logratios.tolist() == [0.0] * 4


# Chosen: mean of log π - log Σπ² = mean(.5, .1) = .3; rejected -.2; so w = e^.1. Log-probs -3 and -2 make h = 1.
WPO_TOKENS, WPO_COLLISIONS = f64(-1, -2, -2), f64(-1.5, -2.1, -1.8)


def wpo_pair(tokens: Tensor) -> PairLogps:
    reference = f64(-1.5, -2.5, -2)
    return pair_logps(tokens, torch.tensor([0, 0, 1]), 1, ref_token_logprobs=reference, log_collisions=WPO_COLLISIONS)


def test_wpo_weights_a_pair_by_how_likely_the_policy_is_to_sample_it():
    tokens = WPO_TOKENS.clone().requires_grad_()
    pair = wpo_pair(tokens)
    assert pair.policy_weight is not None and not pair.policy_weight.requires_grad
    assert pair.policy_weight.item() == pytest.approx(math.exp(0.1), abs=1e-14)
    # The NLL term, 1.5, is not weighted; neither is it detached.
    value = pair_loss(loss("sigmoid", wpo=True, nll_weight=2), pair)
    assert value.item() == pytest.approx(math.exp(0.1) * math.log1p(math.exp(-0.1)) + 2 * 1.5, abs=1e-14)
    (gradient,) = torch.autograd.grad(pair_loss(loss("sigmoid", wpo=True), pair), tokens)
    slope = 0.1 * math.exp(0.1) * logistic(-0.1)
    assert gradient.tolist() == pytest.approx([-slope, -slope, slope], abs=1e-14)


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


def test_token_logprobs_add_up_by_sequence():
    values = f64(-1, -2, -4, -8, -16)
    got = sum_by_sequence(values, torch.tensor([0, 0, 1, 3, 0]), 4)
    assert got.tolist() == [-1 - 2 - 16, -4, 0, -8]
