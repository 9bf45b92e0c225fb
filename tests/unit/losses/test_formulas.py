"""What the papers say of single losses, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dpo_ray.losses.formulas import (
    alpha_divergence_reward,
    hinge_loss,
    ipo_loss,
    kl_estimate,
    log_odds,
    robust_loss,
    sigmoid_loss,
)
from dpo_ray.losses.objective import BatchTerms, pair_loss
from dpo_ray.losses.pair_logps import PairLogps
from tests.unit.losses.cases import GOLDEN, f64, logps, loss, random_pairs


@pytest.mark.parametrize("beta", [0.05, 0.1, 5.0])
def test_swapping_a_pair_changes_the_sigmoid_loss_by_beta_h(beta: float):
    h = f64(-30.0, -2.0, -0.1, 0.0, 0.5, 3.0, 40.0)
    torch.testing.assert_close(sigmoid_loss(h, beta) - sigmoid_loss(-h, beta), -beta * h, rtol=0, atol=1e-12)


def test_the_gradient_of_dpo_is_beta_times_the_weight_of_the_pair():
    # d/dπ(chosen) of -logσ(βh) is -β·σ(-βh): -.1 · σ(-.2) = -.1 · .450166; the opposite for rejected.
    chosen, rejected = f64(-10.0).requires_grad_(), f64(-14.0).requires_grad_()
    pair_loss(loss("sigmoid"), replace(GOLDEN, policy_chosen=chosen, policy_rejected=rejected)).backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.0450166, abs=5e-8)
    assert rejected.grad.item() == pytest.approx(0.0450166, abs=5e-8)


def test_extreme_margins_keep_their_gradients():
    h = f64(-1e6, 1e6).requires_grad_()
    losses = sigmoid_loss(h, 0.1, 0.1)
    # -.9·logσ(∓1e5) - .1·logσ(±1e5) = .9e5 and .1e5
    assert losses.tolist() == pytest.approx([9e4, 1e4], rel=1e-12)
    losses.sum().backward()
    assert h.grad is not None and h.grad.tolist() == pytest.approx([-0.09, 0.01], abs=1e-12)


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


def test_apo_down_pushes_both_down_and_rejected_more():
    pushed = {side: f64(-10.0).requires_grad_() for side in ("policy_chosen", "policy_rejected")}
    equal = replace(logps((-10, -10), (-10, -10)), **pushed)
    pair_loss(loss("apo_down"), equal).backward()
    # β·σ'(0) · (1 - 1) and β·σ'(0): at the start nothing for chosen, .1 · ¼ for rejected.
    assert pushed["policy_chosen"].grad == pytest.approx(0.0, abs=1e-15)
    assert pushed["policy_rejected"].grad == pytest.approx(0.025, abs=1e-15)


def test_discopop_is_logistic_for_wrong_and_exponential_for_right_pairs():
    wrong, right = logps((-40, -10), (-10, -10)), logps((-10, -40), (-10, -10))
    options = loss("discopop", beta=0.1)
    assert pair_loss(options, wrong).item() == pytest.approx(math.log1p(math.exp(3)), abs=1e-12)
    assert pair_loss(options, right).item() == pytest.approx(math.exp(-3), abs=1e-12)


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


def test_the_kl_estimate_is_a_mean_that_is_never_negative():
    ratios = f64(1.0, -0.5, 2.5).requires_grad_()
    assert kl_estimate(ratios).item() == 1.0
    assert not kl_estimate(ratios).requires_grad
    assert kl_estimate(f64(1.0, -3.0)).item() == 0.0
    with pytest.raises(ValueError, match="mismatched"):
        kl_estimate(f64())


def test_log_odds_by_hand():
    # p = 1/2, 1/4, e^-50: log 1, log 1/3, and -50 for so small a p
    odds = log_odds(f64(math.log(0.5), math.log(0.25), -50.0, -1e4))
    assert odds.tolist() == pytest.approx([0.0, -math.log(3), -50.0, -1e4], abs=1e-14)
    assert torch.autograd.gradcheck(log_odds, (f64(-1e-3, -0.1, -3.0, -40.0).requires_grad_(),))


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
