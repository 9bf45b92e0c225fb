"""Who computes a reward model; no Ray is started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import RayError, RayTaskError

from dpo_ray.config import Config, RewardModel
from dpo_ray.on_ray import engine_choice, reward_model
from dpo_ray.on_ray.reward_model import reward_model_work
from dpo_ray.pairs import CANDIDATES
from dpo_ray.storage.artifact import Artifact, publish, write_shard
from dpo_ray.storage.location import Location

TORCH = (0.0, 1.0, 2.0)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RewardModel:
    """A folder without a model in it."""
    for name, content in (("config.json", "{}"), ("tokenizer.json", "{}"), ("model.safetensors", "weights")):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(engine_choice, "has_vllm", lambda: True)
    for module in (engine_choice, reward_model):
        monkeypatch.setattr(module, "require_vllm", lambda _: "0.32.0")
    return RewardModel(path=str(tmp_path))


@pytest.fixture
def candidates(tmp_path: Path) -> Artifact:
    rows = [
        {
            "prompt_id": "00ff",
            "split": "train",
            "prompt": [{"role": "user", "content": "Why?"}],
            "completions": [{"text": text, "num_tokens": 1, "finished": True} for text in "abc"],
        }
    ]
    location = Location.of(tmp_path) / "candidates"
    files = [write_shard(location / "0.parquet", pa.Table.from_pylist(rows, schema=CANDIDATES), {})]
    return publish(location, "candidates", identity={}, inputs={}, files=files)


def config(gpus: int) -> Config:
    tree = {
        "run": {"name": "n", "output": "o"},
        "model": {"path": "m"},
        "data": {"train": "x"},
        "vllm": {"gpus_per_actor": gpus},
    }
    return Config.model_validate(tree)


def engines_that_say(monkeypatch: pytest.MonkeyPatch, vllm: Any, torch: Sequence[float] = TORCH) -> list[str]:
    """Both engines give these scores, or fail; returns who was asked, and for which texts."""
    asked: list[str] = []

    def scored(pool: Any) -> Any:
        texts = [one["text"] for row in pool.arguments["rows"] for one in row["completions"]]
        asked.append(f"{pool.build.__name__} {''.join(texts)}")
        if pool.build.__name__ == "_score_by_torch":
            return list(torch)
        if isinstance(vllm, Exception):
            raise vllm
        return list(vllm)

    monkeypatch.setattr(reward_model, "alone", scored)
    monkeypatch.setattr(engine_choice, "alone", scored)
    return asked


def engine(output: Path, source: RewardModel, candidates: Artifact, gpus: int = 1) -> str:
    """Who computes, as the identity and the pool say."""
    identity, pool = reward_model_work(Location.of(output), config(gpus), source, candidates)
    assert "engine" not in identity
    by_vllm = pool.build is reward_model.vllm_reward_model_shard
    version: str = identity["engine_version"]
    assert version.startswith("vllm 0.32.0" if by_vllm else "torch "), version
    return "vllm" if by_vllm else "torch"


def test_auto_takes_vllm_on_gpus_where_it_agrees_and_keeps_to_it(tmp_path, source, candidates, monkeypatch, capfd):
    asked = engines_that_say(monkeypatch, (0.0, 1.05, 2.0))
    assert engine(tmp_path, source, candidates) == "vllm"
    assert asked == ["_score_by_vllm abc", "_score_by_torch abc"]
    said = "".join(capfd.readouterr())
    assert (
        f"{source.label}: engine=auto: vllm, for on 3 completions vLLM and transformers differ by up to 5.0e-02" in said
    )
    engines_that_say(monkeypatch, (9.0, 9.0, 9.0))
    assert engine(tmp_path, source, candidates) == "vllm"


@pytest.mark.parametrize(
    ("vllm", "why"),
    [
        ((0.0, 1.09, 2.0), "differ by up to 9.0e-02, and the scores' standard deviation is 8.2e-01"),
        ((0.0, math.nan, 2.0), "vLLM gives scores that are not finite"),
        (RayTaskError("score", "boom\nno such model", ValueError()), "vLLM cannot serve this reward model: no such"),
    ],
)
def test_auto_takes_transformers_where_vllm_does_not_agree_or_fails(
    tmp_path, source, candidates, monkeypatch, capfd, vllm, why
):
    engines_that_say(monkeypatch, vllm)
    assert engine(tmp_path, source, candidates) == "torch"
    said = "".join(capfd.readouterr())
    assert "engine=auto: torch, for " in said and why in said


def test_auto_does_not_remember_what_a_lost_node_did(tmp_path, source, candidates, monkeypatch):
    engines_that_say(monkeypatch, RayError("the node died"))
    assert engine(tmp_path, source, candidates) == "torch"
    engines_that_say(monkeypatch, TORCH)
    assert engine(tmp_path, source, candidates) == "vllm"


def test_auto_does_not_decide_on_no_completion(tmp_path, source, monkeypatch, capfd):
    asked = engines_that_say(monkeypatch, TORCH)
    location = Location.of(tmp_path) / "none"
    files = [write_shard(location / "0.parquet", CANDIDATES.empty_table(), {})]
    none = publish(location, "candidates", identity={}, inputs={}, files=files)
    assert engine(tmp_path, source, none) == "torch"
    assert asked == [] and "torch for this run, for there is no completion" in "".join(capfd.readouterr())


def test_auto_is_transformers_on_cpu_and_nothing_is_tried(tmp_path, source, candidates, monkeypatch):
    asked = engines_that_say(monkeypatch, TORCH)
    assert engine(tmp_path, source, candidates, gpus=0) == "torch"
    assert asked == []


@pytest.mark.parametrize("named", ["vllm", "torch"])
def test_an_engine_that_is_named_is_taken_anywhere(tmp_path, source, candidates, monkeypatch, named):
    asked = engines_that_say(monkeypatch, (9.0, 9.0, 9.0))
    chosen = source.model_copy(update={"engine": named})
    assert [engine(tmp_path, chosen, candidates, gpus) for gpus in (0, 1)] == [named, named]
    assert asked == []
