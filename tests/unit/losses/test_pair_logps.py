"""Token log-probs → log-probs of completions, against sums by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dpo_ray.losses.objective import pair_loss
from dpo_ray.losses.pair_logps import PairLogps, pair_logps, sum_by_sequence
from tests.unit.losses.cases import GOLDEN, SEQUENCES, f64, logistic, loss, random_pairs, random_tokens


def test_token_logprobs_add_up_by_sequence():
    values = f64(-1, -2, -4, -8, -16)
    got = sum_by_sequence(values, torch.tensor([0, 0, 1, 3, 0]), 4)
    assert got.tolist() == [-1 - 2 - 16, -4, 0, -8]


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


def test_the_margin_is_the_difference_of_the_log_ratios():
    assert GOLDEN.chosen_logratios.item() == -10 - -11 == 1
    assert GOLDEN.rejected_logratios.item() == -14 - -13 == -1
    assert GOLDEN.margins.item() == 1 - -1 == 2


def test_policy_and_reference_that_are_equal_have_log_ratios_of_exactly_0():
    for dtype in (torch.float32, torch.float64):
        tokens = random_tokens(0).to(dtype)
        pairs = pair_logps(tokens, SEQUENCES, 4, ref_token_logprobs=tokens.double(), ld_alpha=0.3)
        assert pairs.chosen_logratios.tolist() == pairs.rejected_logratios.tolist() == [0.0] * 4


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
