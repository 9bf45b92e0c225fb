"""A model that only scores gives the same, bit for bit, whether its layers are held or stay in its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from dpo_ray.model import for_scoring
from dpo_ray.model.for_scoring import load_for_scoring, weight_bytes
from dpo_ray.model.policy import CompletionScorer, compute_in, load_policy
from tests.training import random_pairs
from tests.unit.model.test_part import MODELS, saved

CPU = torch.device("cpu")


def scores(scorer: CompletionScorer) -> list[torch.Tensor]:
    pairs = random_pairs(6, vocabulary=101)
    with torch.inference_mode():
        return [scorer(scorer.collate(some)).logprobs for some in (pairs[:3], pairs[3:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_it_scores_as_the_trainer_does(
    config: PreTrainedConfig, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = saved(config, tmp_path)
    policy = load_policy(folder)
    compute_in(policy, dtype)
    expected = scores(CompletionScorer(policy).eval())
    held = load_for_scoring(folder, CPU, dtype)
    assert held.packs == CompletionScorer(policy).packs
    assert {p.dtype for p in held.parameters()} == {dtype}
    assert all(map(torch.equal, scores(held), expected))
    monkeypatch.setattr(for_scoring, "memory_of", lambda device: weight_bytes(folder, dtype))
    in_files = load_for_scoring(folder, CPU, dtype)
    layer = next(module for name, module in in_files.model.named_modules() if name.endswith(".0"))
    for _ in range(2):
        assert all(map(torch.equal, scores(in_files), expected))
        assert all(p.is_meta for p in layer.parameters())


def test_what_weights_take_is_told_by_their_files(tmp_path: Path):
    folder = saved(MODELS["llama"], tmp_path)
    count = sum(p.numel() for p in load_policy(folder).parameters())
    assert weight_bytes(folder, torch.bfloat16) == 2 * count
