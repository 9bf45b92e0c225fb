"""The main job on single answers with a label (KTO), and with a loss that needs no reference (SimPO)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command_line import CONFIGS, Finished, overrides, shards_of, summary_of
from tests.rounding import of_sum

pytestmark = pytest.mark.ray

NEAR = 0.1 * of_sum(100, 49152)  # the loss moves by at most β of a pair's log-probs, of which there are fewer than 100


def single_answers(count: int) -> list[dict]:
    """A desirable and an undesirable answer to each prompt, each a row, and one row with a bad label at the end."""
    rows = []
    for n in range(count):
        prompt = f"Name the number after {n}."
        rows.append({"prompt": prompt, "completion": f"It is {n + 1}.", "label": 1})
        rows.append({"prompt": prompt, "completion": f"I will not say, but {n} is not it.", "label": 0})
    return [*rows, {"prompt": "Name a number.", "completion": "Three.", "label": 3}]


def paired_answers(count: int) -> list[dict]:
    return [
        {
            "prompt": f"Name the number after {n}.",
            "chosen": f"It is {n + 1}.",
            "rejected": f"I will not say, but {n} is not it.",
        }
        for n in range(count)
    ]


def run(one_ray: Callable[..., Finished], folder: Path, tiny_model: Path, **more) -> Finished:
    values = {
        "run__name": "numbers",
        "run__output": str(folder / "out"),
        "model__path": str(tiny_model),
        "data__train": str(folder / "data" / "*.parquet"),
        "data__held_out_fraction": 0.25,
        "data__rows_per_shard": 20,
        "train__global_batch_size": 8,
        "train__learning_rate": 1e-3,
        "train__num_workers": 1,
        "train__cpus_per_worker": 1,
        "train__tokens_per_microbatch": 1024,
        "publish__gate__accuracy_above": None,
        **more,
    }
    return one_ray("run", str(CONFIGS / "align_cpu.yaml"), *overrides(**values))


def rows_of(folder: Path, summary: dict, stage: str, kind: str) -> list[dict]:
    files = shards_of(folder / "out", kind, summary["stages"][stage]["fingerprint"])
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_kto_learns_from_single_answers(one_ray, tmp_path, tiny_model, write_preferences):
    write_preferences(tmp_path / "data", single_answers(20))
    done = run(
        one_ray,
        tmp_path,
        tiny_model,
        train__loss={"type": "kto"},
        reference__engine="torch",
        reference__calibration_pairs=4,
    )
    assert done.code == 0, done.log
    summary = summary_of(tmp_path / "out")
    assert summary["stages"]["ingest"]["rows"] == {"in": 41, "kept": 40, "dropped": {"bad_label": 1}}
    assert Path(summary["published"]).is_dir()
    # At the first step policy and reference are equal, so the loss is λ·(1 − σ(0)).
    assert summary["train"]["first_step_loss"] == pytest.approx(0.5, abs=NEAR)
    assert summary["train"]["final"]["kl"] >= 0

    rows = rows_of(tmp_path, summary, "mismatched", "mismatched")
    answers = {tuple(row["chosen_ids"] or row["rejected_ids"]): row["prompt_id"] for row in rows}
    assert len(rows) == 40
    for row in rows:
        assert answers[tuple(row["mismatched_ids"])] != row["prompt_id"]
        assert len(row["mismatched_ref_logprobs"]) == len(row["mismatched_ids"])
    assert {bool(row["chosen_ids"]) for row in rows} == {bool(row["rejected_ids"]) for row in rows} == {True, False}

    # Each prompt is on one side of the split with both its answers, so the held-out ones make up couples.
    held_out = [row for row in rows if row["split"] == "eval"]
    assert summary["eval"]["accuracy"]["n"] == len(held_out) // 2 > 0
    assert summary["stages"]["score"]["rows"]["kept"] == len(held_out)


def test_simpo_computes_no_reference(one_ray, tmp_path, tiny_model, write_preferences):
    write_preferences(tmp_path / "data", paired_answers(40))
    done = run(one_ray, tmp_path, tiny_model, train__loss={"type": "simpo"}, reference__engine="vllm")
    assert done.code == 0, done.log
    summary = summary_of(tmp_path / "out")
    assert {"reference", "calibrate", "mismatched"} & set(summary["stages"]) == set()
    assert "reference" not in summary
    assert not (tmp_path / "out" / "artifacts" / "reference").exists()
    assert Path(summary["published"]).is_dir()
    assert summary["train"]["zero_margin_loss"] is None
    held_out = [r for r in rows_of(tmp_path, summary, "tokenize", "tokenized") if r["split"] == "eval"]
    assert summary["eval"]["accuracy"]["n"] == len(held_out) > 0
    history = (tmp_path / "out" / "runs" / summary["run_id"] / "metrics.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["step"] == summary["train"]["num_steps"]
