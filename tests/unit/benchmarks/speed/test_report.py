"""What the report makes of the runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed.report import Spread, loss_differences, paired_ratios, report
from benchmarks.speed.runs import Place, Setting, speed
from tests.unit.benchmarks.speed.test_pairs import LONG, MIDDLE, SHORT


def step(wall: float, loss: float = 0.5, *, pairs: int = 2, tokens: int = 30, warm_up: bool = False) -> dict:
    return {"wall": wall, "cpu": 2 * wall, "loss": loss, "pairs": pairs, "tokens": tokens, "warm_up": warm_up}


def run(*steps: dict, peak: int = 10**9) -> dict:
    return {
        "environment": {"versions": {"torch": "1"}, "hardware": "a machine", "commit": "abc"},
        "load": {"average": 0.5, "busy_cores": 0.9},
        "peak_rss": peak,
        "peak_gpu": None,
        "batch_size": 2,
        "reference": {"wall": 1.0, "cpu": 2.0, "pairs": 4, "tokens": 60},
        "steps": list(steps),
    }


def test_the_warm_up_does_not_count_and_the_mean_loss_is_over_pairs():
    found = speed(run(step(9.0, 7.0, warm_up=True), step(1.0, 0.6, pairs=3), step(2.0, 0.2, pairs=1)))
    assert (found.wall, found.cpu, found.pairs, found.tokens) == (3.0, 6.0, 4, 60)
    assert found.tokens_per_second == 20
    assert found.mean_loss == pytest.approx((3 * 0.6 + 0.2) / 4)


def test_ratios_are_of_the_same_repeat():
    assert paired_ratios({1: 30.0, 2: 10.0, 3: 50.0}, {1: 10.0, 2: 10.0, 4: 1.0}) == Spread(2.0, 1.0, 3.0)
    assert paired_ratios({1: 30.0}, {2: 10.0}) is None


def test_a_spread_is_the_median_with_its_ends():
    assert Spread.of([3.0, 1.0, 8.0]).text(".1f") == "3.0 (1.0–8.0)"


def test_losses_are_compared_step_by_step():
    assert loss_differences(run(step(1, 0.5), step(1, 0.75)), run(step(1, 0.25), step(1, 1.0))) == [0.25, -0.25]
    with pytest.raises(ValueError, match="zip"):
        loss_differences(run(step(1)), run(step(1), step(1)))


def test_the_report_says_what_the_runs_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    setting = Setting(threads=1, steps=2, pairs_per_step=2)
    place = Place(tmp_path, "generated", "float32")
    place.gemm.parent.mkdir(parents=True)
    place.pairs.write_text("".join(json.dumps(row) + "\n" for row in (SHORT, SHORT, LONG, MIDDLE)))
    shape = {"backbone": [[5, 10]], "head": [10, 5], "num_layers": 1, "attention_width": 1}
    (tmp_path / "model.json").write_text(json.dumps({"path": "a model", "shape": shape}))
    # 2 matrices of 50 weights: 6 · 50 · 24 shared and 6 · 50 · 10 completion tokens, and 12 · (131 + 33) of attention.
    place.gemm.write_text(json.dumps({"gflops_per_second": 2 * (7200 + 3000 + 1968) / 1e9}))
    warm_up = step(9.0, warm_up=True)
    for row, wall, loss in (("ours", 1.0, 0.5), ("trl-fair", 3.0, 0.75), ("trl-tuned", 2.0, 0.25)):
        for repeat in (1, 2):
            kept = run(warm_up, step(wall * repeat, loss), peak=round(wall * 10**9))
            place.run(row, repeat).write_text(json.dumps(kept))
    report(tmp_path, setting, [place])
    told = capsys.readouterr().out
    assert "2 pairs: 38 real tokens, 24 with shared prompts" in told
    assert "| ours | 22 (15–30) |" in told
    assert "| trl-fair | 3.00 (3.00–3.00) | 3.00 (3.00–3.00) | 0.33 (0.33–0.33) | 1.00 (1.00–1.00) |" in told
    assert "| trl-tuned | 2.00 (2.00–2.00) |" in told
    assert "ours reaches 38% (25%–50%) of it" in told
    assert "| trl-fair | 0.5000 | 0.7500 | 2.5e-01 |" in told
    assert "ours 0.5000, trl-tuned 0.2500" in told
    assert "ours.1 0.50, 0.90*" in told


def test_a_folder_without_runs_has_no_report(tmp_path: Path):
    with pytest.raises(SystemExit, match="no finished run"):
        report(tmp_path, Setting(), [Place(tmp_path, "generated", "float32")])
