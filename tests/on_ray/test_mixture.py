"""The main job on a mixture of sources whose pairs are not all alike, over two workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import CONFIGS, overrides, summary_of
from tests.on_ray.test_unpaired import paired_answers, rows_of

pytestmark = pytest.mark.ray

SIZES = {"math": 24, "chat": 60, "safety": 16}
WEIGHTS = {"math": 0.5, "chat": 0.25, "safety": 0.25}


def test_a_mixture_is_trained_by_its_shares_and_told_by_source(one_ray, tmp_path: Path, tiny_model: Path):
    first = 0
    for name, size in SIZES.items():
        rows = paired_answers(first + size)[first:]
        for n, row in enumerate(rows):
            row |= {"weight": 2.0 if n % 2 else 1.0, "preference": 0.5 if n == 3 else 0.9}
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        first += size
    sources = [{"name": name, "path": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in WEIGHTS.items()]
    values = {
        "run__name": "mixture",
        "run__output": str(tmp_path / "out"),
        "model__path": str(tiny_model),
        "data__train": sources,
        "data__ties": "keep",
        "data__held_out_fraction": 0.25,
        "data__rows_per_shard": 20,
        "reference__engine": "torch",
        "reference__calibration_pairs": 4,
        "train__global_batch_size": 8,
        "train__epochs": 2,
        "train__learning_rate": 1e-3,
        "train__num_workers": 2,
        "train__cpus_per_worker": 1,
        "train__tokens_per_microbatch": 256,
        "train__eval_every_steps": 8,
        "publish__gate__accuracy_above": None,
    }
    done = one_ray("run", str(CONFIGS / "align_cpu.yaml"), *overrides(**values))
    assert done.code == 0, done.log
    summary = summary_of(tmp_path / "out")
    kept = rows_of(tmp_path, summary, "tokenize", "tokenized")
    there = {name: sum(row["source"] == name and row["split"] == "train" for row in kept) for name in SIZES}
    trained = summary["train"]["sources"]
    pairs = 8 * summary["train"]["num_steps"]
    for name, weight in WEIGHTS.items():
        assert trained[name]["pairs"] == there[name]
        assert trained[name]["share"] == pytest.approx(weight, abs=2 / pairs)
        assert trained[name]["passes"] == pytest.approx(weight * pairs / there[name], rel=0.05)
        assert done.lines(f"source {name}: {there[name]} pairs, ")
    history = (tmp_path / "out" / "runs" / summary["run_id"] / "metrics.jsonl").read_text().splitlines()
    for metrics in map(json.loads, history):
        assert [metrics[f"sources/{name}/pairs"] for name in WEIGHTS] == [4, 2, 2]
    assert any("eval_sources/math/loss" in line for line in history)
    assert summary["train"]["zero_margin_loss"] is None  # preferences move it

    measured = summary["eval"]["sources"]
    apart = [row for row in kept if row["split"] == "eval" and row["preference"] != 0.5]
    assert {name: one["accuracy"]["n"] for name, one in measured.items() if one["accuracy"]} == {
        name: sum(row["source"] == name for row in apart) for name in sorted(SIZES)
    }
