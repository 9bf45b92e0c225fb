"""Chunked token log-probs against the plain formula."""

from __future__ import annotations

import pytest
import torch

from dpo_ray import logprobs
from dpo_ray.logprobs import token_logprobs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logprobs, "_CHUNK_TOKENS", 4)


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


# One token, a chunk not full, full chunks, a chunk begun.
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 8, 9])
def test_values_and_gradients_equal_log_softmax_across_chunk_borders(num_tokens: int):
    torch.manual_seed(0)
    hidden, weight = torch.randn(num_tokens, 6), torch.randn(11, 6)
    targets = torch.randint(11, (num_tokens,))
    upstream = torch.randn(num_tokens)
    gradients = []
    values = []
    for compute in (lambda h, w: token_logprobs(h, lambda x: x @ w.T, targets), lambda h, w: plain(h, w, targets)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = compute(h, w)
        (out * upstream).sum().backward()
        values.append(out.detach())
        gradients.append((h.grad, w.grad))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=2e-6)
    for mine, reference in zip(gradients[0], gradients[1], strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=4e-6)


def test_the_value_without_gradients_is_the_same_number():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 6), torch.randn(11, 6), torch.randint(11, (9,))
    with torch.no_grad():
        without = token_logprobs(hidden, lambda x: x @ weight.T, targets)
    assert torch.equal(without, token_logprobs(hidden, lambda x: x @ weight.T, targets))


def test_two_equal_logits_are_one_half_each():
    # Logits (0, 0): log(1/2).  Logits (0, log 3): probabilities 1/4 and 3/4.
    hidden = torch.tensor([[0.0], [1.0]])
    weight = torch.tensor([[0.0], [float(torch.tensor(3.0).log())]])
    got = token_logprobs(hidden, lambda x: x @ weight.T, torch.tensor([0, 1]))
    torch.testing.assert_close(got, torch.tensor([0.5, 0.75]).log(), rtol=0, atol=1e-7)


def test_large_logits_stay_finite():
    got = token_logprobs(torch.tensor([[1e4]]), lambda x: torch.cat((x, -x), -1), torch.tensor([1]))
    assert got.item() == -2e4


def test_the_result_is_float32_whatever_the_head_computes_in():
    hidden = torch.randn(5, 6, dtype=torch.bfloat16)
    weight = torch.randn(11, 6, dtype=torch.bfloat16)
    got = token_logprobs(hidden, lambda x: x @ weight.T, torch.randint(11, (5,)))
    assert got.dtype == torch.float32
    # The softmax itself is in float32: probabilities over the vocabulary add up to far more than bfloat16's 3 digits.
    every = torch.stack([token_logprobs(hidden, lambda x: x @ weight.T, torch.full((5,), v)) for v in range(11)])
    torch.testing.assert_close(every.exp().sum(0), torch.ones(5), rtol=0, atol=1e-6)


def test_the_head_never_sees_more_than_a_chunk():
    seen: list[int] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return hidden

    hidden = torch.randn(10, 3, requires_grad=True)
    out = token_logprobs(hidden, head, torch.zeros(10, dtype=torch.long))
    assert seen == [4, 4, 2]
    out.sum().backward()
    # Once more each in the backward pass: logits are recomputed, not kept.
    assert sorted(seen) == [2, 2, 4, 4, 4, 4]


def test_no_tokens_give_no_logprobs():
    got = token_logprobs(torch.zeros(0, 3), lambda x: x, torch.zeros(0, dtype=torch.long))
    assert got.shape == (0,) and got.dtype == torch.float32


def with_collisions(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_logprobs(hidden, lambda x: x @ weight.T, targets, with_collisions=True)


def test_collisions_worked_by_hand():
    # Probabilities (1/2, 1/2): 1/4 + 1/4 = 1/2.  (1/4, 3/4): 1/16 + 9/16 = 5/8.
    hidden = torch.tensor([[0.0], [1.0]])
    weight = torch.tensor([[0.0], [float(torch.tensor(3.0).log())]])
    got = with_collisions(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.75], [0.5, 0.625]]).log(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("num_tokens", [1, 4, 9])
def test_collisions_come_beside_the_same_values_and_gradients(num_tokens: int):
    torch.manual_seed(0)
    hidden, weight = torch.randn(num_tokens, 6), torch.randn(11, 6)
    targets = torch.randint(11, (num_tokens,))
    alone, beside = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logprobs_alone = token_logprobs(alone, lambda x: x @ weight.T, targets)
    both = with_collisions(beside, weight, targets)
    assert torch.equal(both[0], logprobs_alone)
    expected = (hidden @ weight.T).softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(both[1], expected, rtol=0, atol=2e-6)
    logprobs_alone.sum().backward()
    (both[0].sum() + 100 * both[1].sum()).backward()  # the second row carries none
    torch.testing.assert_close(beside.grad, alone.grad, rtol=0, atol=0)


def test_collisions_of_large_logits_stay_exact():
    # Almost all mass on one token: the probability of a collision is 1, its logarithm 0.
    got = token_logprobs(torch.tensor([[1e4]]), lambda x: torch.cat((x, -x), -1), torch.tensor([0]), True)
    assert got.tolist() == [[0.0], [0.0]]


def test_no_tokens_give_no_collisions():
    got = token_logprobs(torch.zeros(0, 3), lambda x: x, torch.zeros(0, dtype=torch.long), True)
    assert got.shape == (2, 0) and got.dtype == torch.float32
