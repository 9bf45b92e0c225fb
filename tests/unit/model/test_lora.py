"""Adapters: training them, publishing them either way, and taking them as models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dpo_ray.config import LoRA, Model
from dpo_ray.errors import ConfigError
from dpo_ray.model.attention import IMPLEMENTATION
from dpo_ray.model.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dpo_ray.model.packing import pack, pad
from dpo_ray.model.policy import CompletionScorer, compute_in, load_policy
from dpo_ray.model.resolve import ModelFolder, adapter_base, resolve
from dpo_ray.pairs import TokenizedPair
from dpo_ray.storage.location import Location
from dpo_ray.training.export import export_policy
from dpo_ray.training.parallel import Rank
from tests.conftest import DEMO_MODEL
from tests.rounding import of_logprob, require_gradients
from tests.training import small_model

PAIRS = [TokenizedPair("a", [504, 314], [99, 100, 2], [7, 2]), TokenizedPair("b", [11], [12, 2], [13, 14, 15, 2])]
SMALL = LoRA(rank=4, alpha=8.0)
NEAR = of_logprob(49152)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scores(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    compute_in(model, dtype)
    scorer = CompletionScorer(model).eval()
    with torch.no_grad():
        return scorer(scorer.collate(PAIRS)).logprobs


def bare_scores(model: Any) -> Tensor:
    """Of any causal model, with all logits held."""
    rows = [(p.prompt_ids, done) for p in PAIRS for done in (p.chosen_ids, p.rejected_ids)]
    found = []
    with torch.no_grad():
        for prompt, done in rows:
            logits = model(input_ids=torch.tensor([prompt + done])).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(-1, torch.tensor(done)[:, None])[:, 0])
    return torch.cat(found)


def scorer_for(policy: Any, layout: Callable[..., Any]) -> CompletionScorer:
    if layout is pad:
        policy.set_attn_implementation("sdpa")
    return CompletionScorer(policy)


def trained(folder: Path, options: LoRA = SMALL) -> Any:
    """A policy whose adapters are as after much training."""
    policy = load_policy(folder, lora=options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    return policy


def state_of(policy: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


def export(target: Path, policy: Any, source: Path, options: LoRA, path: str | None = None, **more: Any) -> Path:
    model = Model(path=path or str(source), lora=options, **more)
    me = Rank(0, 1, torch.device("cpu"))
    export_policy(Location.of(target), policy=policy, source=source, options=model, dtype=None, me=me)
    return target


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    return export(tmp_path / "adapter", trained(tiny_model), tiny_model, SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_with_fresh_adapters_is_the_base(tiny_model: Path, dtype: torch.dtype):
    policy = load_policy(tiny_model, lora=LoRA())
    assert type(policy) is LlamaForCausalLM and policy.config._attn_implementation == IMPLEMENTATION
    assert torch.equal(scores(policy, dtype), scores(load_policy(tiny_model), dtype))


def test_every_linear_layer_but_the_head_is_adapted(tiny_model: Path):
    names = {n for n, p in load_policy(tiny_model, lora=LoRA()).named_parameters() if p.requires_grad}
    assert len(names) == 2 * 2 * 7 and all(".lora_" in n and n.startswith("model.layers.") for n in names)


def test_only_the_named_layers_are_adapted(tiny_model: Path):
    options = LoRA(rank=3, target_modules=("q_proj", "layers.1.mlp.down_proj"))
    policy = load_policy(tiny_model, lora=options)
    adapted = {n.partition(".lora_")[0] for n, p in policy.named_parameters() if p.requires_grad}
    assert adapted == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    }
    single = load_policy(tiny_model, lora=LoRA(target_modules="q_proj"))
    assert sum(p.requires_grad for p in single.parameters()) == 4


def test_the_start_depends_on_the_seed_alone_and_moves_no_generator(tiny_model: Path):
    torch.manual_seed(1)
    first = state_of(load_policy(tiny_model, lora=SMALL, seed=5))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = state_of(load_policy(tiny_model, lora=SMALL, seed=5))
    assert torch.equal(before, torch.get_rng_state())
    other = state_of(load_policy(tiny_model, lora=SMALL, seed=6))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if "lora_A" in n)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("no_proj", ["no_proj", "q_proj", "down_proj", "all-linear"]),
        (("q_proj", "typo"), ["typo", "q_proj"]),
        ("mlp", ["mlp", "no linear layer"]),
        ("lm_head", ["lm_head", "output head"]),
        (("q_proj", "embed_tokens"), ["embed_tokens", "embeddings"]),
        ((), ["names no layer", "q_proj"]),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(tiny_model: Path, targets: Any, said: list[str]):
    with pytest.raises(ConfigError) as caught:
        load_policy(tiny_model, lora=LoRA(target_modules=targets))
    assert all(word in str(caught.value) for word in said), str(caught.value)


@pytest.mark.parametrize("layout", [pack, pad])
def test_gradients_flow_to_the_adapters_and_nowhere_else(tiny_model: Path, layout: Callable[..., Any]):
    policy = trained(tiny_model)
    scorer_for(policy, layout).train()(layout(PAIRS)).logprobs.sum().backward()
    for name, p in policy.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (".lora_" in name), name


@pytest.mark.parametrize("options", [None, SMALL])
@pytest.mark.parametrize("layout", [pack, pad])
def test_activation_checkpointing_changes_no_value_and_no_gradient(
    tiny_model: Path, options: LoRA | None, layout: Callable[..., Any]
):
    found = []
    forwards = 0

    def count(*args: Any) -> None:
        nonlocal forwards
        forwards += 1

    for checkpointing in (False, True):
        policy = load_policy(tiny_model, lora=options, activation_checkpointing=checkpointing)
        if options is not None:
            policy.load_state_dict(state_of(trained(tiny_model)), strict=False)
        forwards = 0
        policy.model.layers[0].mlp.register_forward_pre_hook(count)
        scorer = scorer_for(policy, layout).train()
        values = scorer(layout(PAIRS)).logprobs
        (values * torch.linspace(-1, 1, len(values))).sum().backward()
        assert forwards == 1 + checkpointing
        found.append((values.detach(), {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}))
        with torch.inference_mode():
            scorer.eval()(layout(PAIRS))  # hooks that want gradients on the inputs would fail here
    (plain, gradients), (again, recomputed) = found
    assert torch.equal(plain, again)
    assert gradients.keys() == recomputed.keys()
    require_gradients(list(recomputed.values()), list(gradients.values()))


def test_activation_checkpointing_of_a_model_that_has_none_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        load_policy(tiny_model, activation_checkpointing=True)


def test_policy_adapter_and_merged_model_score_alike(tiny_model: Path, adapter: Path, tmp_path: Path):
    policy = trained(tiny_model)
    expected = scores(policy)
    assert (expected - scores(load_policy(tiny_model))).abs().max() > 0.05
    options = SMALL.model_copy(update={"export": "merged"})
    merged = export(tmp_path / "merged", policy, tiny_model, options)
    assert not (merged / ADAPTER_CONFIG).exists()
    assert load_file(merged / "model.safetensors").keys() == load_file(tiny_model / "model.safetensors").keys()
    beside = AutoModelForCausalLM.from_pretrained(tiny_model)
    for got in (
        scores(load_policy(merged)),
        scores(load_policy(resolve(str(adapter)))),
        bare_scores(PeftModel.from_pretrained(beside, adapter)),
        bare_scores(AutoPeftModelForCausalLM.from_pretrained(adapter)),
        bare_scores(AutoModelForCausalLM.from_pretrained(adapter)),
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=NEAR)


def test_exporting_leaves_the_policy_as_it_is(tiny_model: Path, adapter: Path, tmp_path: Path):
    policy = trained(tiny_model)
    before = scores(policy)
    for way in ("adapter", "merged"):
        export(tmp_path / way, policy, tiny_model, SMALL.model_copy(update={"export": way}))
    assert torch.equal(scores(policy), before)


def test_a_model_with_transposed_layers_is_merged_alike(tiny_model: Path, tmp_path: Path):
    base = tmp_path / "gpt2"
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=600, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    policy = trained(base)
    exported = export(tmp_path / "exported", policy, base, SMALL)
    torch.testing.assert_close(
        scores(load_policy(resolve(str(exported)))), scores(policy), rtol=0, atol=of_logprob(600)
    )


def test_an_exported_adapter_is_a_peft_folder_without_pickles(tiny_model: Path, adapter: Path, tmp_path: Path):
    files = {f.name for f in adapter.iterdir()}
    assert {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt"))] and "config.json" not in files
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tiny_model) and config["revision"] is None
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    again = export(tmp_path / "again", trained(tiny_model), tiny_model, SMALL)
    assert {f: (again / f).read_bytes() for f in files} == {f: (adapter / f).read_bytes() for f in files}


def test_what_an_adapter_names_as_its_base_outlives_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dpo_ray.model.resolve.ModelFolder.is_adapter", False)
    assert adapter_base(Model(path="some-org/some-model", revision="v2")) == ("some-org/some-model", "v2")
    assert adapter_base(Model(path="s3://bucket/some-model")) == ("s3://bucket/some-model", None)
    assert adapter_base(Model(path=DEMO_MODEL)) == (DEMO_MODEL, None)  # not its conversion in the cache
    monkeypatch.chdir(tiny_model.parent)
    assert adapter_base(Model(path=f"./{tiny_model.name}")) == (str(tiny_model), None)
    me = Rank(0, 1, torch.device("cpu"))
    export_policy(
        Location.of(tmp_path / "out"), policy=trained(tiny_model), source=tiny_model, me=me, dtype=None,
        options=Model(path="some-org/some-model", lora=SMALL), base=("some-org/some-model", "v2"),
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some-org/some-model", "v2")


def test_an_adapter_of_a_gguf_file_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    converted = small_model(tmp_path / "converted")
    monkeypatch.setattr("dpo_ray.model.source.converted_gguf", lambda file: converted)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"")
    base, _ = adapter_base(Model(path=str(gguf)))
    assert base == str(gguf)
    policy = trained(converted)
    folder = export(tmp_path / "adapter", policy, converted, SMALL)
    rebase(folder, base)
    torch.testing.assert_close(scores(load_policy(resolve(str(folder)))), scores(policy), rtol=0, atol=NEAR)


def test_an_adapter_of_an_adapter_is_refused_with_a_way_out(adapter: Path):
    with pytest.raises(ConfigError, match=r"(?s)an adapter.*model\.lora\.export=merged"):
        adapter_base(Model(path=str(adapter)))


def test_what_an_adapter_is_known_by_needs_no_merged_weights(
    tiny_model: Path, adapter: Path, tmp_path: Path, own_cache: Path
):
    known = ModelFolder(str(adapter))
    before = known.weights_hash()
    assert known.tokenizer_folder == adapter and known.config()["model_type"] == "llama"
    assert known.tokenizer().get_vocab() == ModelFolder(str(tiny_model)).tokenizer().get_vocab()
    assert not (own_cache / "models").exists()
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    rebase(adapter, str(moved))  # the same base elsewhere is the same model
    assert ModelFolder(str(adapter)).weights_hash() == before
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    assert ModelFolder(str(adapter)).weights_hash() != before
    rebase(adapter, str(tiny_model))
    save_file({n: 2 * t for n, t in load_file(adapter / ADAPTER_WEIGHTS).items()}, adapter / ADAPTER_WEIGHTS)
    assert ModelFolder(str(adapter)).weights_hash() != before
    assert ModelFolder(str(tiny_model)).weights_hash() != before


def test_an_adapter_is_merged_once(adapter: Path, own_cache: Path):
    first = resolve(str(adapter))
    assert first.is_relative_to(own_cache)
    before = first.stat().st_mtime_ns
    assert resolve(str(adapter)) == first and first.stat().st_mtime_ns == before
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, adapter / ADAPTER_WEIGHTS)
    assert resolve(str(adapter)) != first


def test_the_same_adapter_on_a_changed_base_is_another_model(tiny_model: Path, adapter: Path, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    rebase(adapter, str(base))
    first = resolve(str(adapter))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert resolve(str(adapter)) != first


def rebase(adapter: Path, base: Any) -> None:
    """Let the adapter name another base model."""
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": base}))


def test_a_relative_base_lies_beside_the_adapter(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(tiny_model, tmp_path / "base")
    expected = scores(load_policy(resolve(str(adapter))))
    rebase(adapter, "../base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(scores(load_policy(resolve(str(adapter)))), expected)


def test_an_adapter_may_lie_on_an_adapter(tiny_model: Path, adapter: Path, tmp_path: Path):
    source = resolve(str(adapter))
    policy = trained(source)
    second = export(tmp_path / "second", policy, source, SMALL)
    torch.testing.assert_close(scores(load_policy(resolve(str(second)))), scores(policy), rtol=0, atol=NEAR)
    rebase(second, str(adapter))
    torch.testing.assert_close(scores(load_policy(resolve(str(second)))), scores(policy), rtol=0, atol=NEAR)


def test_an_adapter_behind_a_uri_is_merged(adapter: Path, own_cache: Path):
    weights = load_file(resolve(adapter.as_uri()) / "model.safetensors")
    expected = load_file(resolve(str(adapter)) / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_tokenizer_of_the_adapter_goes_before_that_of_the_base(tiny_model: Path, adapter: Path):
    (adapter / "chat_template.jinja").write_text("of the adapter")
    assert AutoTokenizer.from_pretrained(resolve(str(adapter))).chat_template == "of the adapter"
    for file in adapter.iterdir():
        if file.name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            file.unlink()
    expected = AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert AutoTokenizer.from_pretrained(resolve(str(adapter))).chat_template == expected


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(str(folder))
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("base", ["/no/such/base", "../no-such-base", "no-such-org/no-such-model"])
def test_a_missing_base_is_named_with_a_way_out(adapter: Path, base: str):
    rebase(adapter, base)
    said = refusal(adapter)
    assert base in said and "base_model_name_or_path" in said


@pytest.mark.parametrize("base", [None, ""])
def test_an_adapter_without_a_base_is_refused(adapter: Path, base: Any):
    rebase(adapter, base)
    assert "does not say which model it belongs to" in refusal(adapter)


def test_an_adapter_on_itself_is_refused(adapter: Path):
    rebase(adapter, ".")
    assert "names itself" in refusal(adapter)


def test_a_pickled_adapter_is_refused(adapter: Path):
    torch.save(load_file(adapter / ADAPTER_WEIGHTS), adapter / "adapter_model.bin")
    (adapter / ADAPTER_WEIGHTS).unlink()
    assert "pickle" in refusal(adapter)


def test_a_folder_with_a_model_and_an_adapter_is_refused(tiny_model: Path, adapter: Path):
    # The base's configuration alone, as some trainers leave it beside the adapter, makes no model.
    shutil.copy(tiny_model / "config.json", adapter)
    resolve(str(adapter))
    shutil.copy(tiny_model / "model.safetensors", adapter)
    assert "as well" in refusal(adapter)


def test_an_adapter_of_another_model_is_refused_and_never_the_bare_base(tiny_model: Path, adapter: Path):
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    save_file({n.replace("layers.1", "layers.7"): t for n, t in weights.items()}, adapter / ADAPTER_WEIGHTS)
    assert "have no place in the model" in refusal(adapter)
    save_file({n: t for n, t in weights.items() if "layers.1" not in n}, adapter / ADAPTER_WEIGHTS)
    assert "places stay empty" in refusal(adapter)
    save_file({n: t[:1] if "lora_A" in n else t for n, t in weights.items()}, adapter / ADAPTER_WEIGHTS)
    assert "size mismatch" in refusal(adapter)


def peft_folder(folder: Path, base: Path, config: Any) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    model.save_pretrained(folder)
    return folder


def test_other_adapters_that_weights_can_express_are_merged(tiny_model: Path, tmp_path: Path):
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    folder = peft_folder(tmp_path / "ia3", tiny_model, config)
    expected = bare_scores(AutoPeftModelForCausalLM.from_pretrained(folder))
    assert (expected - scores(load_policy(tiny_model))).abs().max() > 0.01
    torch.testing.assert_close(scores(load_policy(resolve(str(folder)))), expected, rtol=0, atol=NEAR)


def test_a_prompt_adapter_cannot_be_merged(tiny_model: Path, tmp_path: Path):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert "PROMPT_TUNING" in refusal(peft_folder(tmp_path / "prompt", tiny_model, config))


def test_an_adapter_on_tied_embeddings_is_not_merged_into_both(tiny_model: Path, tmp_path: Path):
    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    assert "log-probs differ" in refusal(peft_folder(tmp_path / "tied", tiny_model, config))
