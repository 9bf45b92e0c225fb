"""Token scores, tile by tile, against the plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_ray.model import logprobs
from dpo_ray.model.logprobs import Head, token_scores
from tests.rounding import ulps


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logprobs, "TILE_TOKENS", 4)


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    x = hidden @ head.weight.T
    x = (x if head.bias is None else x + head.bias) * head.scale
    return x if head.cap is None else head.cap * torch.tanh(x / head.cap)


def plain(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    return plain_logits(hidden, head).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def logprobs_of(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return token_scores(hidden, Head(weight, **options), targets).logprobs


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "cap": {"cap": 1.5},
    "all": {"bias": True, "scale": 3.0, "cap": 2.0},
}


# One token, a tile not full, full tiles, a tile begun.
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 8, 9])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_values_and_gradients_equal_log_softmax_across_tile_borders(num_tokens: int, options: dict[str, Any]):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(num_tokens, 6), torch.randn(11, 6), torch.randn(11)
    targets = torch.randint(11, (num_tokens,))
    upstream = torch.randn(num_tokens)
    found = []
    for compute in (lambda h, head: token_scores(h, head, targets).logprobs, lambda h, head: plain(h, head, targets)):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        out = compute(h, Head(w, **{**options, "bias": b if "bias" in options else None}))
        (out * upstream).sum().backward()
        found.append((out.detach(), h.grad, w.grad, b.grad))
    assert (found[0][3] is None) == ("bias" not in options)
    for mine, reference in zip(*found, strict=True):
        if reference is not None:
            torch.testing.assert_close(mine, reference, rtol=0, atol=ulps(5, 8))  # logits are below 16


def test_frozen_weights_get_no_gradient_and_do_not_stop_that_of_the_hidden_states():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 6), torch.randn(11, 6), torch.randint(11, (9,))
    gradients = []
    for trained in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        logprobs_of(h, w, targets).sum().backward()
        gradients.append(h.grad)
        assert (w.grad is None) != trained
    assert torch.equal(*gradients)


def test_the_value_without_gradients_is_the_same_number():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 6), torch.randn(11, 6), torch.randint(11, (9,))
    with torch.no_grad():
        without = logprobs_of(hidden, weight, targets)
    assert torch.equal(without, logprobs_of(hidden.requires_grad_(), weight, targets))


FOUR_ROUNDINGS = ulps(4, 0.5)  # an exponential, a sum, its logarithm and a difference, of numbers below 1
LOG_3 = float(torch.tensor(3.0).log())
# Logits (0, 0): probabilities 1/2 and 1/2.  Logits (0, log 3): 1/4 and 3/4.
BY_HAND = torch.tensor([[0.0], [1.0]]), Head(torch.tensor([[0.0], [LOG_3]])), torch.tensor([0, 1])


def test_two_equal_logits_are_one_half_each():
    got = token_scores(*BY_HAND).logprobs
    torch.testing.assert_close(got, torch.tensor([0.5, 0.75]).log(), rtol=0, atol=FOUR_ROUNDINGS)


def test_collisions_worked_by_hand():
    # 1/4 + 1/4 = 1/2, and 1/16 + 9/16 = 5/8.
    got = token_scores(*BY_HAND, with_collisions=True).log_collisions
    torch.testing.assert_close(got, torch.tensor([0.5, 0.625]).log(), rtol=0, atol=FOUR_ROUNDINGS)


def test_entropies_and_mean_logits_worked_by_hand():
    # log 2, and 1/4 log 4 + 3/4 log 4/3 = log 4 − 3/4 log 3.
    got = token_scores(*BY_HAND, with_entropies=True)
    expected = torch.tensor([2.0, 4.0]).log() - torch.tensor([0.0, 0.75 * LOG_3])
    torch.testing.assert_close(got.entropies, expected, rtol=0, atol=2 * FOUR_ROUNDINGS)
    torch.testing.assert_close(got.mean_logits, torch.tensor([0.0, LOG_3 / 2]), rtol=0, atol=FOUR_ROUNDINGS)


def test_only_what_is_asked_for_is_given():
    scores = token_scores(*BY_HAND)
    assert scores.log_collisions is None and scores.entropies is None and scores.mean_logits is None


@pytest.mark.parametrize("extremes", [(1e4, -1e4), (0.0, float("-inf"))], ids=["large", "forbidden token"])
def test_extreme_logits_stay_exact(extremes: tuple[float, float]):
    head = Head(torch.zeros(2, 1), bias=torch.tensor(extremes))
    scores = token_scores(torch.zeros(1, 1), head, torch.tensor([0]), with_collisions=True, with_entropies=True)
    # All mass is on one token: its log-prob and the log collision probability are 0, and so is the entropy.
    assert scores.logprobs.item() == 0.0 and scores.log_collisions.item() == 0.0 and scores.entropies.item() == 0.0


def test_the_result_is_float32_whatever_the_head_computes_in():
    hidden, weight = torch.randn(5, 6, dtype=torch.bfloat16), torch.randn(11, 6, dtype=torch.bfloat16)
    got = logprobs_of(hidden, weight, torch.randint(11, (5,)))
    assert got.dtype == torch.float32
    # The softmax itself is in float32: probabilities over the vocabulary add up to far more than bfloat16's 3 digits.
    every = torch.stack([logprobs_of(hidden, weight, torch.full((5,), v)) for v in range(11)])
    torch.testing.assert_close(every.exp().sum(0), torch.ones(5), rtol=0, atol=ulps(4, 2))  # log-probs are below 4


def test_gradients_of_bfloat16_weights_are_summed_over_tokens_in_float32():
    # The first four tokens' gradient is 256 times that of any later one: in bfloat16 the later ones would be lost.
    hidden = torch.full((4 * 65, 1), 1.0, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.ones(4 * 65)
    upstream[:4] = 256.0
    (logprobs_of(hidden, weight, torch.zeros(4 * 65, dtype=torch.long)) * upstream).sum().backward()
    assert weight.grad.flatten().tolist() == [640.0, -640.0]  # (4 · 256 + 256) / 2


def test_logits_of_more_than_a_tile_never_exist(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, ...]] = []
    logits = Head.logits

    def watched(self: Head, hidden: Tensor) -> Tensor:
        found = logits(self, hidden)
        seen.append(tuple(found.shape))
        return found

    monkeypatch.setattr(Head, "logits", watched)
    hidden, weight = torch.randn(10, 3, requires_grad=True), torch.randn(5, 3)
    out = logprobs_of(hidden, weight, torch.zeros(10, dtype=torch.long))
    assert seen == [(4, 5), (4, 5), (2, 5)]
    out.sum().backward()
    assert seen[3:] == [(10, 2), (10, 2), (10, 1)]  # made anew, not kept


def test_no_tokens_give_no_scores():
    hidden = torch.zeros(0, 3, requires_grad=True)
    got = token_scores(hidden, Head(torch.zeros(4, 3)), torch.zeros(0, dtype=torch.long), with_collisions=True)
    assert got.logprobs.shape == got.log_collisions.shape == (0,) and got.logprobs.dtype == torch.float32
    got.logprobs.sum().backward()
    assert hidden.grad.shape == (0, 3)


@pytest.mark.parametrize("num_tokens", [1, 4, 9])
def test_statistics_come_beside_the_same_values_and_gradients(num_tokens: int):
    torch.manual_seed(0)
    hidden, weight = torch.randn(num_tokens, 6), torch.randn(11, 6)
    targets = torch.randint(11, (num_tokens,))
    alone, beside = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    without = token_scores(alone, Head(weight), targets)
    scores = token_scores(beside, Head(weight), targets, with_collisions=True, with_entropies=True)
    assert torch.equal(scores.logprobs, without.logprobs)
    logits = plain_logits(hidden, Head(weight))  # below 8, and rounded four times in either computation
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(scores.log_collisions, probabilities.square().sum(-1).log(), rtol=0, atol=ulps(8, 4))
    entropies = -(probabilities * probabilities.log()).sum(-1)
    torch.testing.assert_close(scores.entropies, entropies, rtol=0, atol=ulps(8, 4))
    torch.testing.assert_close(scores.mean_logits, logits.mean(-1), rtol=0, atol=ulps(8, 4))
    assert not (scores.log_collisions.requires_grad or scores.entropies.requires_grad)
    without.logprobs.sum().backward()
    scores.logprobs.sum().backward()
    torch.testing.assert_close(beside.grad, alone.grad, rtol=0, atol=0)
