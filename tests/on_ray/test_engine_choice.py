"""The gate before the pass with real engines: vLLM is tried once, taken, refused, or torch is taken in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dpo_ray.config.tolerance import Tolerance
from dpo_ray.errors import ReferenceMismatch
from dpo_ray.on_ray import calibrate
from tests.command_line import CONFIGS, Finished, overrides, summary_of

pytestmark = [pytest.mark.ray, pytest.mark.vllm]


def reference(run: Callable[..., Finished], folder: Path, model: Path, **more: Any) -> Finished:
    settings = {
        "run__output": str(folder / "out"),
        "model__path": str(model),
        "data__train": str(folder / "data" / "*.parquet"),
        "reference__engine": "auto",
        "reference__calibration_pairs": 4,
        **more,
    }
    return run("reference", str(CONFIGS / "align_cpu.yaml"), *overrides(**settings))


def rows(first: int) -> list[dict[str, str]]:
    return [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No {n}."} for n in range(first, first + 20)]


def engines_of(output: Path) -> list[str]:
    manifests = (output / "artifacts" / "reference").glob("*/manifest.json")
    return [json.loads(path.read_text())["identity"]["engine"] for path in manifests]


def test_vllm_that_agrees_is_chosen_and_more_data_change_nothing(one_ray, tmp_path, servable_model, write_preferences):
    write_preferences(tmp_path / "data", rows(0), name="a.parquet")
    done = reference(one_ray, tmp_path, servable_model)
    assert done.code == 0, done.log
    assert done.lines("before the pass: scoring 4 pairs with vLLM")
    assert done.lines("reference.engine=auto: vllm, for on 4 pairs vLLM and the trainer's forward agree: ")
    assert summary_of(tmp_path / "out")["reference"]["engine"] == "vllm"

    write_preferences(tmp_path / "data", rows(20), name="b.parquet")
    again = reference(one_ray, tmp_path, servable_model)
    assert again.code == 0, again.log
    assert not again.lines("before the pass: scoring")
    assert again.lines("1 of 2 shards are finished already")
    assert engines_of(tmp_path / "out") == ["vllm", "vllm"]


def test_a_model_that_vllm_cannot_serve_is_scored_by_torch(one_ray, tmp_path, tiny_model, write_preferences):
    write_preferences(tmp_path / "data", rows(0))
    done = reference(one_ray, tmp_path, tiny_model)
    assert done.code == 0, done.log
    assert done.lines("reference.engine=auto: torch, for vLLM cannot score this model: ")
    assert engines_of(tmp_path / "out") == ["torch"]


@pytest.fixture
def louder(servable_model: Path, tmp_path: Path) -> Path:
    """The servable model with its logits twenty times as large: without that, a random model has next to none."""
    return scaled(servable_model, tmp_path / "louder", 20.0)


def scaled(model: Path, folder: Path, factor: float) -> Path:
    """The model with other logits, by its last norm."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.long
def test_in_bfloat16_vllm_passes_and_one_that_computes_another_model_is_refused_before_the_pass(
    one_ray, tmp_path, louder, write_preferences, monkeypatch
):
    write_preferences(tmp_path / "data", rows(0))
    other = str(scaled(louder, tmp_path / "other", 1.5))

    def by_another_model(model: Any, options: Any, max_model_len: int, pairs: Any) -> Any:
        from dpo_ray.on_ray.vllm_engine import VLLMScorer

        return VLLMScorer(model.model_copy(update={"path": other}), options, max_model_len).score(pairs)

    options = {"reference__engine": "vllm", "model__dtype": "bfloat16", "run__output": str(tmp_path / "wrong")}
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "_score_by_vllm", by_another_model)
        refused = reference(one_ray, tmp_path, louder, **options)
    assert refused.code == ReferenceMismatch.exit_code, refused.log
    assert "Nothing has been scored: on 4 pairs vLLM and the trainer's forward do not agree: " in refused.log
    assert not list((tmp_path / "wrong" / "artifacts").glob("reference/*"))

    done = reference(one_ray, tmp_path, louder, **options | {"run__output": str(tmp_path / "right")})
    assert done.code == 0, done.log
    assert engines_of(tmp_path / "right") == ["vllm"]
    found = summary_of(tmp_path / "right")["reference"]["calibration"]
    assert found["token"]["p99"] > Tolerance().limits("float32").p99_per_token  # so it is bfloat16
