"""Models that will be needed later are looked for before work begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError
from pipelines.preflight import require_models, require_reward


def config(model: Path, **more: Any) -> Config:
    tree = {"run": {"name": "n", "output": "o"}, "model": {"path": str(model)}, "data": {"train": "x"}}
    return parse_config(tree | more)


def against(path: Path) -> dict[str, Any]:
    return {"win_rate": {"against": {"path": str(path)}}}


@pytest.mark.parametrize(("until", "refused"), [("train", False), ("evaluate", True), ("publish", True)])
def test_the_model_of_the_win_rate_is_looked_for_where_it_is_measured(tiny_model, tmp_path, until, refused):
    found = config(tiny_model, evaluate=against(tmp_path / "none"))
    if not refused:
        require_models(found, until)
        return
    with pytest.raises(ConfigError, match="/none"):
        require_models(found, until)


def test_a_model_that_is_sampled_needs_a_chat_template(tiny_model: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("chat_template*"))
    require_models(config(tiny_model))
    with pytest.raises(ConfigError, match="bare"):
        require_models(config(tiny_model, evaluate=against(bare)))
    models = [{"samples": 1}, {"samples": 1, "path": str(bare)}]
    sampled = {"data": {}, "generate": {"prompts": "p", "models": models}}
    with pytest.raises(ConfigError, match="bare"):
        require_models(config(tiny_model, **sampled))


def test_a_reward_model_that_vllm_is_to_serve_needs_vllm(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dpo_ray.on_ray.vllm_version.has_vllm", lambda: False)
    for engine in ("auto", "torch", "vllm"):
        source = {"type": "reward_model", "path": str(tiny_model), "engine": engine, "name": "ours"}
        reward = config(tiny_model, evaluate={"win_rate": {"reward": [source]}}).evaluate.win_rate.reward
        if engine != "vllm":
            require_reward(reward)
            continue
        with pytest.raises(ConfigError, match="The reward ours with engine=vllm needs vLLM"):
            require_reward(reward)
