"""How fast a worker trains, tried out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_ray.config import Model, Train
from dpo_ray.training import speed
from tests.training import random_pairs, scored


@pytest.mark.parametrize("options", [{}, {"loss": {"type": "orpo"}}, {"loss": {"type": "aot"}}])
def test_tokens_are_those_of_a_step_over_its_seconds(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
):
    clock = iter([10.0, 14.0, 20.0, 22.0])
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    pairs = scored(random_pairs(4), small_model)
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    train = Train.model_validate({"global_batch_size": 4, **options})
    found = speed.tokens_per_second(Model(path=str(small_model)), train, pairs, torch.device("cpu"))
    assert found == pytest.approx(tokens / 2)
