"""Models that will be needed later are looked for before work begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_ray.config import Config, Judge, LoRA, Rule, parse_config
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.model.lora import save_adapter
from dpo_ray.model.policy import load_policy
from dpo_ray.storage.artifact import Artifact
from pipelines.generate import _tell_unread
from pipelines.preflight import checks, preflight, require_models, require_reward


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
    with pytest.raises(ConfigError, match=r"evaluate\.win_rate\.against\.path is .*/none, and there is no such folder"):
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


def test_a_template_named_by_its_file_is_enough_and_is_looked_at_first(tiny_model: Path, tmp_path: Path):
    bare, file = tmp_path / "bare", tmp_path / "own.jinja"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("chat_template*"))
    models = [config(model) for model in (bare, tiny_model)]
    named = [
        one.model_copy(update={"model": one.model.model_copy(update={"chat_template": str(file)})}) for one in models
    ]
    for one in named:
        with pytest.raises(ConfigError, match=r"model\.chat_template is .*own\.jinja, which cannot be read"):
            require_models(one)
    file.write_text("{{ messages }}")
    for one in named:
        require_models(one)


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


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_models_that_score_are_looked_for_with_their_templates(tiny_model: Path, tmp_path: Path, name: str):
    bare = shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template*"))
    for path, said in ((tmp_path / "none", "no such folder"), (bare, "chat template")):
        source = {"type": "implicit", "policy": str(tiny_model), "name": "ours", name: str(path)}
        reward = config(tiny_model, evaluate={"win_rate": {"reward": [source]}}).evaluate.win_rate.reward
        with pytest.raises(ConfigError, match=said):
            require_reward(reward)


def sampling(model: Path, tmp_path: Path, count: int, **more: Any) -> Config:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "Say {n}."}}\n' for n in range(count)))
    return config(model, **{"data": {}, "generate": {"prompts": str(file)}, "evaluate": {"win_rate": {}}, **more})


def test_prompts_are_looked_at_before_anything_is_sampled(tiny_model: Path, tmp_path: Path):
    preflight(sampling(tiny_model, tmp_path, 40))
    with pytest.raises(DataError, match="there is no prompt in it"):
        preflight(sampling(tiny_model, tmp_path, 0))
    with pytest.raises(DataError, match=r"All 4 prompts of .* are held out \(data.held_out_fraction=0.999\)"):
        preflight(sampling(tiny_model, tmp_path, 4, data={"held_out_fraction": 0.999}))
    preflight(sampling(tiny_model, tmp_path, 4, data={"held_out_fraction": 0.999}), "generate")
    none_held_out = sampling(tiny_model, tmp_path, 40, data={"held_out_fraction": 0.0})
    with pytest.raises(DataError, match=r"none is held out \(data.held_out_fraction=0\)"):
        preflight(none_held_out)
    preflight(none_held_out, "train")


def test_sets_are_looked_at_before_anything_is_sampled(tiny_model: Path, tmp_path: Path, write_preferences):
    file = write_preferences(tmp_path / "bench", [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}])
    preflight(sampling(tiny_model, tmp_path, 40, evaluate={"sets": {"bench": str(file)}}))
    for name, columns in (("none", None), ("other", {"question": "Why?"})):
        path = tmp_path / name if columns is None else write_preferences(tmp_path / name, [columns])
        found = sampling(tiny_model, tmp_path, 40, evaluate={"sets": {"bench": str(path)}})
        with pytest.raises((ConfigError, DataError)):
            preflight(found)
        preflight(found, "train")


def test_a_judge_of_whom_nothing_can_be_read_is_told(capfd: pytest.CaptureFixture[str]):
    judge = Judge(model="j", name="ours")

    def scores(**counters: int) -> Artifact:
        return SimpleNamespace(manifest=SimpleNamespace(counters=counters), location="out/rewards/0")

    _tell_unread(judge, scores(judged=9, completions=6))
    _tell_unread(Rule(function="a:b"), scores(judge_unparseable=9))
    assert "".join(capfd.readouterr()) == ""
    _tell_unread(judge, scores(judged=9, judge_unparseable=2, orders_disagree=4))
    assert "ours: of 9 verdicts 2 could not be read and 4 changed with the order" in "".join(capfd.readouterr())
    with pytest.raises(
        DataError, match=r"Of 9 verdicts asked of ours none could be read, in 3 attempts .*out/rewards/0"
    ):
        _tell_unread(judge, scores(judged=9, judge_unparseable=9))


def lora(model: dict[str, Any], **more: Any) -> Config:
    return parse_config({"run": {"name": "n", "output": "o"}, "data": {"train": "x"}, "model": model} | more)


def test_the_balance_of_experts_is_refused_before_work_begins_where_there_are_none(tiny_model: Path, tmp_path: Path):
    from transformers import MixtralConfig

    found = config(tiny_model, train={"router_aux_loss": 0.1})
    with pytest.raises(ConfigError, match=r"train\.router_aux_loss=0\.1 is for mixtures of experts .* has none"):
        dict(checks(found, "train"))["routers"]()
    of_experts = tmp_path / "experts"
    shutil.copytree(tiny_model, of_experts)
    MixtralConfig(num_local_experts=4).save_pretrained(of_experts)
    dict(checks(config(of_experts, train={"router_aux_loss": 0.1}), "train"))["routers"]()
    assert "routers" not in dict(checks(config(tiny_model), "train"))


def test_an_adapter_that_would_have_no_base_is_refused_before_work_begins(tiny_model: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    policy = load_policy(tiny_model, lora=LoRA(rank=2))
    save_adapter(adapter, policy=policy, state=policy.state_dict(), base=str(tiny_model))
    tree: dict[str, Any] = {"path": str(adapter), "lora": {"export": "adapter"}}
    with pytest.raises(ConfigError, match=r"model\.lora\.export=merged"):
        require_models(lora(tree), "train")
    require_models(lora({**tree, "lora": {"export": "merged"}}), "train")
    require_models(lora(tree), "reference")
    saved = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**saved, "base_model_name_or_path": "/no/such/base"}))
    with pytest.raises(ConfigError, match="/no/such/base"):
        require_models(lora(tree), "reference")


def test_rounds_of_adapters_alone_are_refused():
    rounds: dict[str, Any] = {
        "data": {},
        "generate": {"prompts": "p"},
        "evaluate": {"win_rate": {}},
        "iterate": {"rounds": 2},
    }
    with pytest.raises(ConfigError, match=r"model\.lora\.export=merged"):
        lora({"path": "m", "lora": {}}, **rounds)
    lora({"path": "m", "lora": {"export": "merged"}}, **rounds)
    lora({"path": "m", "lora": {}}, **rounds | {"iterate": {"rounds": 1}})
