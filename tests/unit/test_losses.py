"""The losses against values worked out by hand, in float64.

Golden pair: log-probs under the policy (-10, -14) and the reference (-11, -13), 5 and 8 tokens; so the log-ratios
are 1 and -1, and h = 2. β = .1 unless stated, so that βh = .2.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from dpo_ray.config import HingeLoss, IPOLoss, Loss, RobustLoss, SigmoidLoss
from dpo_ray.losses import (
    PairLogps,
    hinge_loss,
    ipo_loss,
    pair_loss,
    rewards,
    robust_loss,
    sigmoid_loss,
    sum_by_sequence,
    zero_margin_loss,
)

ALL_LOSSES: list[Any] = [
    SigmoidLoss(type="sigmoid"),
    SigmoidLoss(type="sigmoid", beta=0.5, label_smoothing=0.2),
    RobustLoss(type="robust"),
    HingeLoss(type="hinge", beta=0.3),
    IPOLoss(type="ipo", beta=0.2),
]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logps(policy: tuple[float, float], reference: tuple[float, float], tokens: tuple[int, int] = (5, 8)) -> PairLogps:
    return PairLogps(
        f64(policy[0]), f64(policy[1]), f64(reference[0]), f64(reference[1]), f64(tokens[0]), f64(tokens[1])
    )


GOLDEN = logps((-10, -14), (-11, -13))


@pytest.mark.parametrize(
    ("config", "value"),
    [
        # log(1 + e^-.2)
        (SigmoidLoss(type="sigmoid"), 0.598139),
        # .9 · .598139 + .1 · log(1 + e^.2) = .9 · .598139 + .1 · .798139
        (SigmoidLoss(type="sigmoid", label_smoothing=0.1), 0.618139),
        # (.9 · .598139 - .1 · .798139) / .8
        (RobustLoss(type="robust", label_smoothing=0.1), 0.573139),
        # 1 - .2
        (HingeLoss(type="hinge"), 0.8),
        # (1/5 + 1/8 - 5)² = 4.675²
        (IPOLoss(type="ipo"), 21.855625),
    ],
    ids=lambda x: f"{x.type}" if not isinstance(x, float) else "",
)
def test_golden_values(config: Loss, value: float):
    assert pair_loss(config, GOLDEN).item() == pytest.approx(value, abs=5e-7)


def test_the_margin_is_the_difference_of_the_log_ratios():
    assert GOLDEN.chosen_logratios.item() == -10 - -11 == 1
    assert GOLDEN.rejected_logratios.item() == -14 - -13 == -1
    assert GOLDEN.margins.item() == 1 - -1 == 2


def test_swapping_a_pair_negates_the_margin():
    swapped = logps((-14, -10), (-13, -11), (8, 5))
    assert swapped.margins.item() == -GOLDEN.margins.item()


@pytest.mark.parametrize("config", ALL_LOSSES, ids=lambda c: c.type)
def test_each_loss_knows_its_value_where_policy_equals_reference(config: Loss):
    equal = logps((-10, -14), (-10, -14))
    assert pair_loss(config, equal).item() == pytest.approx(zero_margin_loss(config), abs=1e-12)


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (SigmoidLoss(type="sigmoid", beta=0.7, label_smoothing=0.3), math.log(2)),
        (RobustLoss(type="robust", beta=0.7), math.log(2)),
        (HingeLoss(type="hinge", beta=0.7), 1.0),
        (IPOLoss(type="ipo", beta=0.1), 25.0),  # (1 / .2)²
        (IPOLoss(type="ipo", beta=0.5), 1.0),  # (1 / 1)²
    ],
    ids=lambda x: f"{x.type}" if not isinstance(x, float) else "",
)
def test_the_zero_margin_values_by_hand(config: Loss, value: float):
    assert zero_margin_loss(config) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("config", ALL_LOSSES, ids=lambda c: c.type)
def test_a_larger_margin_costs_less_below_the_optimum(config: Loss):
    # h = 2.4. With smoothing .2 and β = .5 the sigmoid loss is least at h = log(.8 / .2) / .5 = 2.77.
    better = logps((-9.8, -14.2), (-11, -13))
    assert pair_loss(config, better).item() < pair_loss(config, GOLDEN).item()


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
    # Mean log-ratios 3 and -2 differ by 5 = 1 / (2 · .1).
    assert ipo_loss(f64(3.0), f64(-2.0), 0.1).item() == 0.0
    assert ipo_loss(f64(4.0), f64(-2.0), 0.1).item() == 1.0


def test_ipo_is_the_only_loss_that_sees_the_lengths():
    longer = logps((-10, -14), (-11, -13), (10, 16))
    for config in ALL_LOSSES:
        same = pair_loss(config, longer).item() == pair_loss(config, GOLDEN).item()
        assert same is not isinstance(config, IPOLoss)


def test_extreme_margins_stay_finite_with_finite_gradients():
    h = f64(-1e6, 1e6).requires_grad_()
    loss = sigmoid_loss(h, 0.1, 0.1)
    # -.9·logσ(∓1e5) - .1·logσ(±1e5) = .9e5 and .1e5
    assert loss.tolist() == pytest.approx([9e4, 1e4], rel=1e-12)
    loss.sum().backward()
    assert h.grad is not None and h.grad.tolist() == pytest.approx([-0.09, 0.01], abs=1e-12)


@pytest.mark.parametrize("config", ALL_LOSSES, ids=lambda c: c.type)
def test_gradients_agree_with_finite_differences(config: Loss):
    torch.manual_seed(0)
    reference = torch.randn(2, 4, dtype=torch.float64)
    tokens = torch.tensor([[5.0, 1, 3, 7], [8.0, 2, 3, 1]], dtype=torch.float64)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return pair_loss(config, PairLogps(chosen, rejected, *reference, *tokens))

    chosen, rejected = torch.randn(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


def test_the_gradient_of_dpo_is_beta_times_the_weight_of_the_pair():
    # d/dπ(chosen) of -logσ(βh) is -β·σ(-βh): -.1 · σ(-.2) = -.1 · .450166; the opposite for rejected.
    chosen, rejected = f64(-10.0).requires_grad_(), f64(-14.0).requires_grad_()
    pair_loss(SigmoidLoss(type="sigmoid"), PairLogps(chosen, rejected, *f64(-11, -13, 5, 8)[:, None])).backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.0450166, abs=5e-8)
    assert rejected.grad.item() == pytest.approx(0.0450166, abs=5e-8)


def test_rewards_are_beta_times_the_log_ratios():
    chosen, rejected = rewards(SigmoidLoss(type="sigmoid", beta=0.3), GOLDEN)
    assert (chosen.item(), rejected.item()) == pytest.approx((0.3, -0.3), abs=1e-12)


def test_the_rewards_of_ipo_are_per_token_as_its_loss_sees_them():
    chosen, rejected = rewards(IPOLoss(type="ipo", beta=0.1), GOLDEN)
    assert (chosen.item(), rejected.item()) == pytest.approx((0.1 * 1 / 5, 0.1 * -1 / 8), abs=1e-12)


def test_rewards_carry_no_gradient():
    policy = f64(-10.0).requires_grad_()
    chosen, rejected = rewards(SigmoidLoss(type="sigmoid"), PairLogps(policy, policy, *f64(-11, -13, 5, 8)[:, None]))
    assert not chosen.requires_grad and not rejected.requires_grad


@pytest.mark.parametrize("config", ALL_LOSSES, ids=lambda c: c.type)
def test_each_pair_of_a_batch_has_the_loss_it_has_alone(config: Loss):
    batch = PairLogps(f64(-10, -3), f64(-14, -9), f64(-11, -4), f64(-13, -7), f64(5, 2), f64(8, 3))
    alone = [GOLDEN, logps((-3, -9), (-4, -7), (2, 3))]
    expected = torch.cat([pair_loss(config, pair) for pair in alone])
    torch.testing.assert_close(pair_loss(config, batch), expected, rtol=0, atol=1e-14)


def test_every_loss_of_the_configuration_is_tested_here():
    tags = TypeAdapter(Loss).json_schema()["discriminator"]["mapping"]
    assert set(tags) == {config.type for config in ALL_LOSSES}


def test_token_logprobs_add_up_by_sequence():
    values = f64(-1, -2, -4, -8, -16)
    got = sum_by_sequence(values, torch.tensor([0, 0, 1, 3, 0]), 4)
    assert got.tolist() == [-1 - 2 - 16, -4, 0, -8]
