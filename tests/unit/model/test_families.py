"""Models of many families: on the layout that they are said to run on, they compute what transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.attention import FAMILIES, WINDOW, Computed, Family, alone, micro_batch, saved
from dpo_ray.model.attention import IMPLEMENTATION
from dpo_ray.model.policy import CompletionScorer, load_policy
from tests.rounding import GRADIENT, of_logprob

PAIRS = micro_batch()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_pairs_are_computed_as_each_sequence_alone_in_values_and_gradients(
    family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = saved(family, tmp_path)
    policy = load_policy(folder)
    scorer = CompletionScorer(policy).train()
    assert scorer.layout == family.layout
    told = capfd.readouterr().err
    assert ("does not run on packed pairs" in told) == (family.layout == "padded")
    assert (f"sliding windows of {WINDOW} tokens" in told) == family.windowed
    assert ("step by step" in told) == (family.architecture in {"Gemma2", "GptOss"})
    assert (": each completion with its prompt by itself" in told) == ("apart" in family.layout)
    policy.double()  # but for the output layer's logits: what is left is a difference, not rounding
    policy.set_experts_implementation("eager")  # the other one is not for float64
    if family.layout != "padded":
        assert policy.config._attn_implementation == IMPLEMENTATION
    found = Computed.of(scorer(scorer.collate(PAIRS)).logprobs, policy)
    values, gradients = found.apart(truth := alone(folder, PAIRS))
    assert values <= of_logprob(64)
    assert gradients <= GRADIENT
    # A parameter that has a gradient in one has it in the other.
    assert {n for n, g in found.gradients.items() if g is not None} == {
        n for n, g in truth.gradients.items() if g is not None
    }


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.windowed], ids=lambda family: family.name)
def test_the_windows_matter_by_a_single_token(family: Family, tmp_path: Path):
    folder = saved(family, tmp_path)
    with torch.no_grad():
        scorer = CompletionScorer(load_policy(folder)).eval()
        found = scorer(scorer.collate(PAIRS)).logprobs
        config = family.config(sliding_window=WINDOW + 1)
        config.save_pretrained(folder)
        wider = CompletionScorer(load_policy(folder)).eval()
        other = wider(wider.collate(PAIRS)).logprobs
    assert (found - other).abs().max() > 1e-2
