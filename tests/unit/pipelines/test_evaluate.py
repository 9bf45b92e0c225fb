"""What is measured on held-out pairs, from their scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpo_ray.config import parse_config
from dpo_ray.evaluation.held_out import HeldOut
from pipelines import evaluate

CONFIG = parse_config({"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": "x"}})


def calibration(worst: float) -> Any:
    metrics = {"sequence": {"max": worst}, "bias_per_token": 0.0, "bias_standard_error": 0.0}
    return SimpleNamespace(manifest=SimpleNamespace(metrics=metrics))


@pytest.mark.parametrize(("worst", "share"), [(0.001, 0.0), (0.5, 0.75), (1.0, 0.75)])
def test_margins_within_the_noise_are_counted_and_told_of(
    worst: float, share: float, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    margins = np.array([0.9, 0.5, -0.2, 9.0])
    tokens = np.array([5, 5, 5, 5])
    found = HeldOut(
        margins=margins,
        gaps=margins,
        ref_gaps=margins - 0.1,
        chosen_logps=-margins,
        chosen_ref_logps=-margins,
        chosen_tokens=tokens,
        rejected_tokens=tokens,
        sources=np.array([None] * 4, dtype=object),
    )
    monkeypatch.setattr(evaluate, "held_out_pairs", lambda scores: found)
    told = evaluate._held_out(CONFIG, SimpleNamespace(), calibration(worst))  # type: ignore[arg-type]
    assert told["within_noise"] == {"share": share, "nats": 2 * worst} and told["accuracy"]["n"] == 4
    assert ("75% of the margins are no larger than" in capfd.readouterr().err) is (share > 0.5)
