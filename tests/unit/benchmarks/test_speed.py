"""The pure parts of benchmarks.speed: which pairs are measured, what is counted, and what the report makes of it."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.speed.clock import busy_cores
from benchmarks.speed.pairs import (
    by_length,
    fixed_pair,
    generated_pairs,
    lengths_of,
    middle,
    padded_tokens,
    real_tokens,
    repeated,
    select,
    shared_tokens,
)
from benchmarks.speed.parts import group_of, imbalance
from benchmarks.speed.report import Spread, loss_differences, paired_ratios, report
from benchmarks.speed.runs import Place, Setting, settled, speed
from benchmarks.speed.schedule import in_turn


def pair(prompt: int, chosen: int, rejected: int) -> dict[str, list[int]]:
    return {"prompt_ids": [1] * prompt, "chosen_ids": [2] * chosen, "rejected_ids": [3] * rejected}


SHORT, LONG, MIDDLE = pair(1, 1, 2), pair(10, 1, 5), pair(4, 3, 1)


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


# Which pairs


def test_pairs_are_selected_by_their_longer_completion():
    assert select(iter([LONG, SHORT, MIDDLE, SHORT]), 2, max_tokens=7) == [SHORT, MIDDLE]


def test_too_few_pairs_end_the_run():
    with pytest.raises(SystemExit, match="Only 1 pairs have at most 6 tokens; 2 are needed"):
        select([LONG, SHORT, MIDDLE], 2, max_tokens=6)


def test_generated_pairs_are_the_same_for_a_seed_and_about_as_long_as_they_should_be():
    some = list(islice(generated_pairs(100), 500))
    assert some[:5] == list(islice(generated_pairs(100), 5))
    assert some[:5] != list(islice(generated_pairs(100, seed=1), 5))
    medians = [statistics.median(sizes) for sizes in zip(*map(lengths_of, some), strict=True)]
    assert medians == pytest.approx([150, 45, 45], rel=0.15)
    assert all(0 <= i < 100 for ids in some[0].values() for i in ids)


def test_a_fixed_pair_has_the_lengths_asked_for():
    assert lengths_of(fixed_pair(random.Random(0), 50, (8, 4, 2))) == (8, 4, 2)


def test_sorted_pairs_stay_the_same_pairs():
    assert by_length([SHORT, LONG, MIDDLE]) == [LONG, MIDDLE, SHORT]


def test_the_middle_and_the_repeated_warm_up():
    rows = [pair(n, 1, 1) for n in range(5)]
    assert middle(rows, 3) == rows[1:4]
    assert middle(rows, 9) == rows
    assert repeated(rows[:2], 5) == [rows[0], rows[1], rows[0], rows[1], rows[0]]


# What is counted


def test_tokens_are_counted_real_shared_and_padded():
    assert real_tokens([LONG, SHORT]) == (20 + 1 + 5) + (2 + 1 + 2)
    assert shared_tokens([LONG, SHORT]) == 16 + 4
    assert padded_tokens([LONG, SHORT, MIDDLE], 2) == 2 * 2 * 15 + 2 * 1 * 7


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


def test_imbalance_of_ranks():
    # 3 against a mean of 2, and 4 against 4; over both steps 7 are waited for where 6 would do.
    assert imbalance([[3.0, 1.0], [4.0, 4.0]]) == ([1.5, 1.0], 7 / 6)


def test_cores_in_use_between_two_readings():
    before = "cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1\ncpu1 1\nintr 5\n"
    after = "cpu  160 0 120 780 140 0 0 0 0 0\ncpu0 1\ncpu1 1\nintr 9\n"  # 80 of 200 ticks on two cores
    assert busy_cores(before, after) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::addmm", "matmul"),
        ("aten::mkldnn_linear_backward", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::copy_", "copy/cast"),
        ("aten::logsumexp", "softmax/log-prob"),
        ("aten::silu_backward", "elementwise/norm"),
        ("aten::exp_", "softmax/log-prob"),
        ("aten::expand", "other"),
        ("aten::view", "other"),
    ],
)
def test_operations_have_their_group(operation: str, group: str):
    assert group_of(operation) == group


# The folder


def test_the_rows_run_forwards_and_then_backwards():
    assert in_turn(["a", "b"], 3) == [(1, "a"), (1, "b"), (2, "b"), (2, "a"), (3, "a"), (3, "b")]


def test_a_folder_keeps_its_setting(tmp_path: Path):
    first = settled(tmp_path, {"steps": 3, "threads": 2})
    assert (first.steps, first.pairs_per_step, first.threads) == (3, 4, 2)
    assert settled(tmp_path, {}) == settled(tmp_path, {"steps": 3})
    with pytest.raises(SystemExit, match="steps 3"):
        settled(tmp_path, {"steps": 4})


def test_batch_sizes_must_fill_a_step():
    with pytest.raises(SystemExit, match=r"\[4\] do not divide --pairs-per-step 6"):
        Setting(pairs_per_step=6, trl_batch_sizes=[2, 4, 8])


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


def test_our_side_runs_and_is_reported(tmp_path: Path, demo_model: str):
    small = ["--random-llama", "64x2", "--threads", "1", "--steps", "2", "--pairs-per-step", "2", "--max-tokens", "200"]
    chosen = ["--data", "generated", "--dtype", "bfloat16", "--rows", "ours", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--folder", str(tmp_path), *small, *chosen],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "## generated, bfloat16" in done.stdout and "\n| ours | " in done.stdout and "Floor: " in done.stdout


def test_a_folder_without_runs_has_no_report(tmp_path: Path):
    with pytest.raises(SystemExit, match="no finished run"):
        report(tmp_path, Setting(), [Place(tmp_path, "generated", "float32")])
