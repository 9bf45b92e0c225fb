"""What routers choose, counted over the tokens of pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from benchmarks.attention import FAMILIES, Family, micro_batch, saved
from dpo_ray.model.attention import IMPLEMENTATION
from dpo_ray.model.packing import pack, pad
from dpo_ray.model.policy import CompletionScorer, load_policy
from dpo_ray.model.routing import Routing, balance_loss, most_and_least, routing
from tests.rounding import require_gradients

# Two layers of three experts, four tokens of which one is padding and one counts twice; two experts a token.
LOGITS = (
    torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [9.0, 9.0, 0.0], [2.0, 0.0, 1.0]]),
    torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 9.0, 9.0], [0.0, 1.0, 2.0]]),
)
OCCURRENCES = torch.tensor([[1.0, 2.0, 0.0, 1.0]])


def test_choices_by_hand():
    found = routing(LOGITS, OCCURRENCES, 2)
    assert found.choices.tolist() == [[2, 3, 3], [3, 4, 1]]
    assert found.tokens == 8
    assert float(found.probabilities.sum()) == pytest.approx(8)
    assert most_and_least(found.choices) == (pytest.approx(4 / 8), pytest.approx(1 / 8))


def test_the_balance_of_even_use_is_the_number_of_experts_a_token_has():
    even = Routing(torch.full((3, 8), 10.0), torch.full((8,), 15.0), torch.tensor(120.0))  # 40 tokens, two experts each
    assert float(balance_loss(*even)) == pytest.approx(2)


def test_the_balance_is_what_transformers_computes_of_padded_rows():
    torch.manual_seed(0)
    logits = tuple(torch.randn(3 * 7, 8, requires_grad=True) for _ in range(4))
    mask = (torch.rand(3, 7) > 0.3).long()
    expected = load_balancing_loss_func(logits, 8, 2, mask)
    found = balance_loss(*routing(logits, mask, 2))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for mine, other in zip(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-9)


def test_parts_of_a_batch_add_up_to_the_balance_of_the_whole():
    torch.manual_seed(0)
    logits = [torch.randn(20, 8, dtype=torch.float32) for _ in range(2)]
    counts = torch.randint(0, 3, (20,)).float()
    whole = routing(logits, counts, 2)
    parts = [routing([x[cut] for x in logits], counts[cut], 2) for cut in (slice(0, 6), slice(6, 20))]
    assert torch.equal(sum(p.choices for p in parts), whole.choices)
    added = sum(balance_loss(whole.choices, p.probabilities, whole.tokens) for p in parts)
    torch.testing.assert_close(added, balance_loss(*whole), rtol=1e-6, atol=0)


EXPERTS = [f for f in FAMILIES if "experts" in f.name and "DeepSeek" not in f.name]


@pytest.mark.parametrize("family", EXPERTS, ids=lambda family: family.name)
def test_packed_and_padded_pairs_are_sent_to_the_same_experts_and_balanced_alike(family: Family, tmp_path: Path):
    pairs = micro_batch()
    policy = load_policy(saved(family, tmp_path))
    own = "eager" if family.architecture == "GptOss" else "sdpa"
    policy.double().set_experts_implementation("eager")  # no token is so near between two experts
    scorer = CompletionScorer(policy).train()
    assert scorer.routes
    found, gradients = [], []
    for implementation, layout in ((IMPLEMENTATION, pack), (own, pad)):
        policy.set_attn_implementation(implementation)
        scorer.zero_grad()
        found.append(scorer(layout(pairs), with_routing=True).routing)
        balance_loss(*found[-1]).backward()
        gradients.append([p.grad for p in scorer.parameters()])
    assert torch.equal(found[0].choices, found[1].choices) and found[0].tokens == found[1].tokens
    torch.testing.assert_close(found[0].probabilities, found[1].probabilities, rtol=1e-6, atol=0)
    require_gradients(*gradients, of_all=True)
    layers, experts = found[0].choices.shape
    tokens = sum(len(p.prompt_ids) + len(a) for p in pairs for a in (p.chosen_ids, p.rejected_ids) if a)
    assert experts == 4 and found[0].tokens == layers * tokens
    assert found[0].choices.sum(1).tolist() == [2 * tokens] * layers


def test_a_model_without_experts_has_none(tmp_path: Path):
    assert not CompletionScorer(load_policy(saved(FAMILIES[0], tmp_path))).routes
