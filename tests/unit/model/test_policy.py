"""Loading the policy, and its forward pass down to log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpo_ray.model.packing import pack, pad
from dpo_ray.model.policy import CompletionScorer, compute_in, load_policy, output_head, torch_dtype
from dpo_ray.pairs import TokenizedPair
from tests.rounding import of_logprob, ulps

PAIRS = [TokenizedPair("a", [504, 314], [99, 100, 2], [7, 2]), TokenizedPair("b", [11], [12, 2], [13, 14, 15, 2])]

# In bfloat16 a logit is rounded at its own size, below ½; that of a hidden state, by every product before it.
NEAR = {"float32": of_logprob(49152), "bfloat16": ulps(8, 0.25, torch.bfloat16)}


def test_the_policy_has_float32_weights_and_no_dropout(tmp_path: Path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    policy = load_policy(tmp_path).train()
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    dropouts = [m for m in policy.modules() if isinstance(m, nn.Dropout)]
    assert dropouts and all(m.p == 0.0 for m in dropouts)


def test_attention_has_no_dropout_either(tmp_path: Path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attention_dropout=0.5)).save_pretrained(tmp_path)
    scorer = CompletionScorer(load_policy(tmp_path)).train()
    pairs = [TokenizedPair("a", [5, 6, 7], [8, 9, 2], [10, 2])]
    for layout in (pack, pad):
        scorer.model.set_attn_implementation("dpo_packed" if layout is pack else "sdpa")
        with torch.no_grad():
            assert torch.equal(scorer(layout(pairs)).logprobs, scorer(layout(pairs)).logprobs)
    assert scorer.model.config.attention_dropout == 0.5  # of the model that is exported


def scorer_in(dtype: str, folder: Path) -> CompletionScorer:
    policy = load_policy(folder)
    compute_in(policy, torch_dtype(dtype))
    return CompletionScorer(policy)


def test_scores_while_training_are_the_scores_while_evaluating(tiny_model: Path):
    scorer = CompletionScorer(load_policy(tiny_model))
    with torch.no_grad():
        assert torch.equal(scorer.train()(pack(PAIRS)).logprobs, scorer.eval()(pack(PAIRS)).logprobs)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_scores_are_float32_log_probs_in_either_precision(tiny_model: Path, name: str):
    scorer = scorer_in(name, tiny_model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    with torch.no_grad():
        got = scorer(scorer.collate(PAIRS)).logprobs
        first = plain(torch.tensor([[504, 314, 99, 100, 2]])).logits[0, 1:-1].log_softmax(-1)
    assert got.dtype == torch.float32
    expected = first.gather(-1, torch.tensor([[99], [100], [2]]))[:, 0]
    torch.testing.assert_close(got[:3], expected, rtol=0, atol=NEAR[name])


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_collisions_are_over_the_whole_vocabulary(tiny_model: Path, name: str):
    scorer = scorer_in(name, tiny_model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    with torch.no_grad():
        got = scorer(scorer.collate(PAIRS), with_collisions=True)
        assert torch.equal(got.logprobs, scorer(scorer.collate(PAIRS)).logprobs)
        first = plain(torch.tensor([[504, 314, 99, 100, 2]])).logits[0, 1:-1].softmax(-1)
    assert got.log_collisions.shape == (11,) and got.log_collisions.dtype == torch.float32
    expected = first.double().square().sum(-1).log().float()
    torch.testing.assert_close(got.log_collisions[:3], expected, rtol=0, atol=2 * NEAR[name])  # of squares


class Bare(nn.Module):
    """Just a head and a configuration."""

    def __init__(self, **options: Any):
        super().__init__()
        self.config = LlamaConfig(**options)
        self.out = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.out.weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3.0, -4.0]),
        ({"logit_scale": 0.5}, [1.5, -2.0]),
        ({"logits_scaling": 4.0}, [0.75, -1.0]),
        ({"final_logit_softcapping": 2.0}, [2 * 0.905148254, 2 * -0.964027580]),  # 2 · tanh(3/2), 2 · tanh(-4/2)
    ],
)
def test_the_head_scales_and_caps_as_the_configuration_says(options: dict[str, Any], expected: list[float]):
    got = output_head(Bare(**options)).logits(torch.tensor([[3.0, -4.0]]))[0]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=ulps(4, 2))
