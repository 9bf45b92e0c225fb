"""A whole run on quantized weights with moments of 8 bits: it starts where its reference is, and publishes a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.command_line import CONFIGS, Finished, overrides, summary_of
from tests.on_ray.test_unpaired import paired_answers

pytestmark = [
    pytest.mark.ray,
    pytest.mark.long,
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed"),
]


def test_a_run_on_four_bits_is_calibrated_trained_and_published(
    one_ray: Callable[..., Finished], tmp_path: Path, tiny_model: Path, write_preferences: Callable[..., Path]
):
    write_preferences(tmp_path / "data", paired_answers(40))
    values = {
        "run__name": "numbers",
        "run__output": str(tmp_path / "out"),
        "model__path": str(tiny_model),
        "model__lora": {"rank": 64, "quantization": "nf4", "export": "merged"},
        "data__train": str(tmp_path / "data" / "*.parquet"),
        "data__rows_per_shard": 20,
        "reference__engine": "auto",
        "train__optimizer": "adamw_8bit",
        "train__activation_checkpointing": 2,
        "train__global_batch_size": 8,
        "train__learning_rate": 1e-3,
        "train__num_workers": 1,
        "train__cpus_per_worker": 1,
        "publish__gate__accuracy_above": None,
    }
    done = one_ray("run", str(CONFIGS / "align_cpu.yaml"), *overrides(**values))
    assert done.code == 0, done.log
    assert done.lines("reference.engine=auto: torch, for model.lora.quantization=nf4")
    summary = summary_of(tmp_path / "out")
    assert summary["reference"]["engine"] == "torch"
    assert summary["train"]["first_step_loss"] == pytest.approx(math.log(2), abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(summary["published"])
    assert "quantization_config" not in json.loads((Path(summary["published"]) / "config.json").read_text())
    assert sum(p.numel() for p in model.parameters()) > 0
