"""A model that computes in bfloat16 with a copy of its weights, which themselves stay in float32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dpo_ray.config import LoRA
from dpo_ray.model.computing_copy import ComputingCopy
from dpo_ray.model.policy import CompletionScorer, load_policy
from dpo_ray.training.parallel import Rank, accumulating, parallelize
from tests.training import random_pairs

ME = Rank(0, 1, torch.device("cpu"))


class Tied(nn.Module):
    """One weight in two layers, with a layer and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.between, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.rand(5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self.embedding(ids) * self.table.to(self.between.weight.dtype)))


IDS = torch.tensor([1, 3, 3, 6])


def test_what_is_computed_and_its_gradients_are_those_of_the_weights_cast():
    model, plain = Tied(), Tied().bfloat16()
    with ComputingCopy(model, torch.bfloat16).in_place():
        assert model.head.weight is model.embedding.weight and model.table.dtype == torch.float32
        out = model(IDS)
        out.float().square().sum().backward()
    expected = plain(IDS)
    expected.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(weight, nn.Parameter) and weight.dtype == weight.grad.dtype == torch.float32, name
        assert torch.equal(weight.grad, other.grad.float()), name


def test_gradients_of_several_passes_are_added_up_in_float32():
    # 1 and 256 times 2⁻⁸ of it: in bfloat16 none of the small ones would be left beside the first.
    model = nn.Linear(1, 1, bias=False)
    copied = ComputingCopy(model, torch.bfloat16)
    for value in (1.0, *[2.0**-9] * 4):
        with copied.in_place():
            model(torch.tensor([[value]], dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad.item() == 1 + 4 * 2.0**-9


def test_the_copy_is_of_the_weights_as_they_are_now():
    model = Tied()
    copied = ComputingCopy(model, torch.bfloat16)
    for rate in (0.0, 1.0):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        torch.optim.AdamW(model.parameters(), lr=rate, fused=True).step()  # it does not tell autograd of its writing
        expected = model.between.weight.detach().bfloat16()
        with copied.in_place():
            assert torch.equal(model.between.weight, expected)


def test_within_another_one_it_does_nothing_and_an_error_leaves_the_weights_in_place():
    model = Tied()
    weights = dict(model.named_parameters())
    copied = ComputingCopy(model, torch.bfloat16)
    with pytest.raises(ZeroDivisionError), copied.in_place():
        held = model.head.weight
        with copied.in_place():
            assert model.head.weight is held
        assert model.head.weight is held
        raise ZeroDivisionError
    assert all(weight is weights[name] for name, weight in model.named_parameters())


@pytest.mark.parametrize("lora", [None, LoRA(rank=3)], ids=["whole", "lora"])
def test_a_policy_that_computes_its_activations_again_has_the_same_gradients(small_model: Path, lora: LoRA | None):
    found = []
    for again in (False, True):
        scorer = CompletionScorer(load_policy(small_model, lora=lora, activation_checkpointing=again)).train()
        forward = parallelize(scorer, "ddp", ME, torch.bfloat16)
        with accumulating(forward, last=True):
            forward(scorer.collate(random_pairs(3))).logprobs.sum().backward()
        found.append({name: p.grad for name, p in scorer.named_parameters() if p.requires_grad})
        frozen = [p for p in scorer.parameters() if not p.requires_grad]
        assert all(p.dtype == torch.float32 and p.grad is None for p in frozen) and bool(frozen) == (lora is not None)
    assert found[0].keys() == found[1].keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, found[1][n]) for n, value in found[0].items())
    assert any(value.any() for value in found[0].values())


def test_a_scorer_gives_the_same_as_one_whose_weights_are_in_bfloat16(small_model: Path):
    scorer = CompletionScorer(load_policy(small_model))
    plain = copy.deepcopy(scorer)
    for weight in plain.parameters():
        weight.data = weight.data.bfloat16()
    parallelize(scorer, "ddp", ME, torch.bfloat16)
    batch = scorer.collate(random_pairs(3))
    assert torch.equal(scorer(batch).logprobs, plain(batch).logprobs)
