"""Models of many families: on the layout that they are said to run on, they compute what transformers does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.attention import FAMILIES, WINDOW, Computed, Family, alone, micro_batch, saved
from dpo_ray.model.attention import IMPLEMENTATION
from dpo_ray.model.packing import MicroBatch, pack
from dpo_ray.model.policy import CompletionScorer, compute_in, load_policy, load_untried_policy, use_packed_attention
from dpo_ray.model.segment import Segment
from dpo_ray.pairs import TokenizedPair
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


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_rounding_in_bfloat16_decides_no_layout(family: Family, tmp_path: Path):
    assert layout_in_bfloat16(saved(family, tmp_path)) == family.layout


@pytest.mark.parametrize("fault", ["moved", "seen"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in {"Llama", "Gemma 3, mixed windows"}], ids=str)
def test_a_layout_that_is_wrong_by_little_is_told_from_rounding(
    family: Family, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def wrong(pairs: Sequence[TokenizedPair]) -> MicroBatch:
        packed = pack(pairs)
        if fault == "moved":  # as where a model counts positions by itself
            places = torch.cat([torch.arange(sum(pair[1:])) for pair in packed.segments or ()])
            return replace(packed, position_ids=places[None])
        seeing = tuple(Segment(s.start, s.shared, s.chosen + s.rejected, 0) for s in packed.segments or ())
        return replace(packed, segments=seeing)

    monkeypatch.setattr("dpo_ray.model.policy.pack", wrong)
    assert layout_in_bfloat16(saved(family, tmp_path)) == "padded"


def layout_in_bfloat16(folder: Path) -> str:
    policy = load_untried_policy(folder)
    compute_in(policy, torch.bfloat16)
    use_packed_attention(scorer := CompletionScorer(policy), dtype=torch.bfloat16)
    return scorer.layout
