"""Rewards and margins: what is reported is what the loss sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpo_ray.losses.formulas import sigmoid_loss
from dpo_ray.losses.objective import pair_loss, preference_margins, rewards
from dpo_ray.losses.pair_logps import PairLogps, pair_logps
from tests.unit.losses.cases import (
    ALL_LOSSES,
    GOLDEN,
    LOSS,
    SEQUENCES,
    logistic,
    loss,
    name,
    random_pairs,
    random_tokens,
    select,
    softplus,
    weighted,
)


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


@pytest.mark.parametrize("options", [o for o in ALL_LOSSES if o.needs_reference and o.type != "r_dpo"], ids=name)
def test_rewards_are_0_where_policy_equals_reference(options: Any):
    equal = pair_logps(random_tokens(0), SEQUENCES, 4, ref_token_logprobs=random_tokens(0))
    assert rewards(options, equal)[0].tolist() == rewards(options, equal)[1].tolist() == [0.0] * 4


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


def test_every_loss_of_the_configuration_is_tested_here():
    tags = LOSS.json_schema()["discriminator"]["mapping"]
    assert set(tags) == {options.type for options in ALL_LOSSES} == {*LOSS_OF_REWARDS, "weighted"}


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
