"""Parts of a model, put together, are what from_pretrained loads, whatever form the files are in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from dpo_ray.config import LoRA
from dpo_ray.model.part import Part, PartOfModel, read_part
from dpo_ray.model.policy import load_part_of_policy, load_policy

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    # Their files hold each expert by itself, and the model all of a layer in one tensor.
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16),
    "gpt2": GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4),
    "gemma2": Gemma2Config(**SIZES, head_dim=8),
}


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    """In bfloat16, in several files."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    return folder


def together(parts: list[PartOfModel]) -> dict[str, torch.Tensor]:
    shapes = {name: p.shape for name, p in parts[0].model.named_parameters(remove_duplicate=False)}
    assert all(part.weights.keys() == shapes.keys() for part in parts)
    cut = Part(0, len(parts)).dimension
    return {name: torch.cat([p.weights[name] for p in parts], cut(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", MODELS)
def test_parts_make_the_whole(name: str, tmp_path: Path):
    folder = saved(MODELS[name], tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    for number in (1, 2, 4, 7):
        parts = [read_part(folder, Part(n, number)) for n in range(number)]
        found = together(parts)
        assert all(torch.equal(found[n], p) for n, p in expected.items())
        for part in parts:
            model = part.model
            assert type(model) is type(whole) and model.training == whole.training
            assert all(p.is_meta for p in model.parameters())
            assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]  # ties
            buffers = dict(model.named_buffers())  # as the rotary frequencies, which no file has
            assert all(torch.equal(buffers[n], value) for n, value in whole.named_buffers())
            assert model.config.to_dict() == whole.config.to_dict()
            assert model.generation_config.to_dict() == whole.generation_config.to_dict()
            assert str(model._weight_conversions) == str(whole._weight_conversions)  # an export goes by it


def test_a_weight_that_no_file_has_is_drawn_alike_by_all(tmp_path: Path):
    folder = saved(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), tmp_path)
    for file in folder.glob("*.safetensors"):
        kept = {name: value for name, value in load_file(file).items() if "q_proj" not in name}
        save_file(kept, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        lines = index.read_text().splitlines()
        index.write_text("\n".join(line for line in lines if "q_proj" not in line))
    name = "model.layers.0.self_attn.q_proj.weight"
    drawn = together([read_part(folder, Part(n, 2)) for n in range(2)])[name]
    assert drawn.std() > 0 and torch.equal(drawn, read_part(folder, Part(0, 1)).weights[name])
    state = torch.get_rng_state()
    read_part(folder, Part(0, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_each_process_has_as_much_of_a_weight_whose_first_dimension_is_short():
    part = Part(5, 16)
    assert part.dimension(torch.Size([8, 64, 32])) == 1  # 8 experts
    assert part.within(torch.Size([8, 64, 32])) == (slice(None), slice(20, 24))
    assert part.dimension(torch.Size([1000, 64])) == 0
    assert part.within(torch.Size([1000, 64])) == (slice(5 * 63, 6 * 63),)  # as torch.chunk: 62.5 rows are 63
    assert Part(15, 16).within(torch.Size([1000, 64])) == (slice(945, 1000),)
    assert part.dimension(torch.Size([3])) == 0
    assert part.within(torch.Size([3])) == (slice(3, 3),)  # nothing is left for it


def test_adapters_begin_as_those_of_a_whole_model_do(tmp_path: Path):
    folder = saved(MODELS["llama"], tmp_path)
    options = LoRA(rank=3)
    whole = load_policy(folder, lora=options, seed=5)
    found = load_part_of_policy(folder, Part(1, 2), lora=options, seed=5).model
    expected = dict(whole.named_parameters())
    for name, parameter in found.named_parameters():
        assert parameter.requires_grad == expected[name].requires_grad and parameter.shape == expected[name].shape
        assert parameter.is_meta == (".lora_" not in name)
        assert parameter.is_meta or torch.equal(parameter, expected[name])
