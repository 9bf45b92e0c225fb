"""reference.engine=auto with real engines: decided by what they say, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import CONFIGS, Finished, overrides, summary_of

pytestmark = [pytest.mark.ray, pytest.mark.vllm]


def reference(run: Callable[..., Finished], folder: Path, model: Path) -> Finished:
    settings = {
        "run__output": str(folder / "out"),
        "model__path": str(model),
        "data__train": str(folder / "data" / "*.parquet"),
        "reference__engine": "auto",
        "reference__calibration_pairs": 4,
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
    assert done.lines("reference.engine=auto: scoring 4 pairs with vLLM")
    assert done.lines("reference.engine=auto: vllm, for on 4 pairs vLLM and the trainer's forward differ by up to")
    assert summary_of(tmp_path / "out")["reference"]["engine"] == "vllm"

    write_preferences(tmp_path / "data", rows(20), name="b.parquet")
    again = reference(one_ray, tmp_path, servable_model)
    assert again.code == 0, again.log
    assert not again.lines("reference.engine=auto: scoring")
    assert again.lines("1 of 2 shards are finished already")
    assert engines_of(tmp_path / "out") == ["vllm", "vllm"]


def test_a_model_that_vllm_cannot_serve_is_scored_by_torch(one_ray, tmp_path, tiny_model, write_preferences):
    write_preferences(tmp_path / "data", rows(0))
    done = reference(one_ray, tmp_path, tiny_model)
    assert done.code == 0, done.log
    assert done.lines("reference.engine=auto: torch, for vLLM cannot score this model: ")
    assert engines_of(tmp_path / "out") == ["torch"]
