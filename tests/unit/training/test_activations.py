"""What the backward pass keeps of a token: counted on two layers, it is that of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_ray.config import Model, Train
from dpo_ray.model import attention
from dpo_ray.model.packing import pack
from dpo_ray.model.policy import CompletionScorer
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training import activations
from dpo_ray.training.activations import counted_bytes_per_token

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    LlamaConfig(**SIZES, num_hidden_layers=6, vocab_size=32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    return ModelFolder(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_the_whole_model_keeps(folder: ModelFolder, dtype: str):
    attention.register()
    config = LlamaConfig(**SIZES, num_hidden_layers=6, vocab_size=32)
    policy = AutoModelForCausalLM.from_config(config, attn_implementation=attention.IMPLEMENTATION).train()
    policy.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    pair = TokenizedPair("a", [3] * 128, [4] * 128, [5] * 128)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = CompletionScorer(policy)(pack([pair])).logprobs
    measured = sum(size for size, _ in kept.values()) / pair.num_tokens
    counted = counted_bytes_per_token(folder, Model(path=folder.place, dtype=dtype), Train())
    # Beside the layers there are the embeddings, the last norm and the logits of 32 words; masks are of the square.
    assert counted == pytest.approx(measured, rel=0.08)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer_whole(folder: ModelFolder):
    model = Model(path=folder.place)
    whole = counted_bytes_per_token(folder, model, Train())
    found = counted_bytes_per_token(folder, model, Train(activation_checkpointing=True))
    assert found == pytest.approx(whole / 6 + 6 * 4 * 128)


def test_a_layer_that_is_too_large_is_not_tried(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activations, "_MOST_PARAMETERS", 1000)
    assert counted_bytes_per_token(folder, Model(path=folder.place), Train()) is None
