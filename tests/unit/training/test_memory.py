"""The estimate behind train.tokens_per_microbatch=auto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from dpo_ray.config import Model, Train
from dpo_ray.errors import ConfigError
from dpo_ray.model import attention
from dpo_ray.model.packing import pack
from dpo_ray.model.policy import CompletionScorer
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training import memory
from dpo_ray.training.memory import (
    MOST_TOKENS_CPU,
    MOST_TOKENS_GPU,
    Shape,
    bytes_per_token,
    gathered_bytes,
    shape_of,
    state_bytes,
    tokens_that_fit,
)

GIB = 2**30
EIGHT_BILLION = Shape(8_000_000_000, 32, 4096, 14336, 128256, 32, outside=1_050_677_248, tied=False)
LINEAR = Shape(10**9, 32, 4096, 14336, 128256, 32, outside=10**8, tied=False, linear=9 * 10**8, sides=1)
SMALL = Shape(135_000_000, 30, 576, 1536, 49152, 9, outside=28_312_128, tied=True)


def fits(shape: Shape, gib: float, num_workers: int = 1, model: dict[str, Any] | None = None, **train: Any) -> int:
    options = {"dtype": "bfloat16", **(model or {})}
    return tokens_that_fit(
        shape, Model(path="m", **options), Train(**train), memory=int(gib * GIB), num_workers=num_workers
    )


def test_shape_is_read_off_the_configuration(tmp_path: Path):
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=100)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    model = AutoModelForCausalLM.from_config(config)
    assert shape_of(ModelFolder(str(tmp_path))) == Shape(
        sum(p.numel() for p in model.parameters()),
        3,
        64,
        96,
        100,
        32,
        outside=2 * 100 * 64 + 64,
        tied=False,
        linear=3 * (4 * 64 * 64 + 3 * 64 * 96),
        sides=3 * (4 * 128 + 3 * 160),
    )


def test_experts_count_as_many_times_as_a_token_goes_through_them(tmp_path: Path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 100, "moe_intermediate_size": 48}
    Qwen3MoeConfig(**sizes, num_experts=8, num_experts_per_tok=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    assert shape_of(ModelFolder(str(tmp_path))).intermediate == 96


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_counted_for_a_token_is_at_least_what_is_kept_and_not_twice_that(dtype: str, checkpointing: bool):
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4}
    attention.register()
    config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=32)
    policy = AutoModelForCausalLM.from_config(config, attn_implementation=attention.IMPLEMENTATION).train()
    policy.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    pair = TokenizedPair("a", [3] * 256, [4] * 128, [5] * 128)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = CompletionScorer(policy)(pack([pair])).logprobs
    measured = sum(size for size, _ in kept.values()) / pair.num_tokens
    shape = Shape(0, 4, 128, 384, 32, 4, outside=0, tied=False)
    train = Train(activation_checkpointing=checkpointing)
    counted = bytes_per_token(shape, Model(path="m", dtype=dtype), train)
    if checkpointing:  # one layer is whole in the backward pass, beside what is kept of all
        one_layer = bytes_per_token(
            Shape(0, 1, 128, 384, 32, 4, outside=0, tied=False), Model(path="m", dtype=dtype), Train()
        )
        measured += one_layer / 2
    assert measured <= counted <= 2 * measured


def test_a_small_model_is_bounded_by_what_is_useful_and_not_by_memory():
    assert fits(SMALL, 24, model={"dtype": "float32"}) == MOST_TOKENS_CPU
    assert fits(SMALL, 141, use_gpu=True) == MOST_TOKENS_GPU


def test_worked_by_hand():
    # 0.8 · 8 GiB − 135e6 · 16 B of state − 3 · 256 · 4 · 49152 B of logits, over 30 · 4 · (18 · 576 + 4 · 1536) B.
    expected = (0.8 * 8 * GIB - 135e6 * 16 - 3072 * 49152) // (30 * 4 * (18 * 576 + 4 * 1536))
    assert fits(SMALL, 8, model={"dtype": "float32"}, use_gpu=True) == int(expected)


def test_replicas_have_their_gradients_twice():
    model, train = Model(path="m"), Train(strategy="ddp")
    assert state_bytes(SMALL, model, train, 1) == 16 * SMALL.parameters
    assert state_bytes(SMALL, model, train, 2) == 20 * SMALL.parameters
    assert state_bytes(SMALL, model, Train(strategy="fsdp"), 2) == 8 * SMALL.parameters
    assert state_bytes(SMALL, Model(path="m", lora={}), train, 2) == 4 * SMALL.parameters
    half = Model(path="m", dtype="bfloat16")
    assert state_bytes(SMALL, half, train, 2) == 22 * SMALL.parameters
    assert state_bytes(SMALL, half, Train(use_gpu=True), 2) == 18 * SMALL.parameters  # FSDP has no buckets


def test_workers_of_a_sharded_model_gather_some_of_it():
    model, train, adapters = Model(path="m"), Train(strategy="fsdp"), Model(path="m", lora={})
    end = 128256 * 4096
    assert gathered_bytes(EIGHT_BILLION, model, Train(), 2) == 0
    # The head and its gradient, and the gradient as it travels; in float32 and in bfloat16.
    assert gathered_bytes(EIGHT_BILLION, model, train, 2) == 12 * end
    assert gathered_bytes(EIGHT_BILLION, Model(path="m", dtype="bfloat16"), train, 2) == 8 * end
    assert gathered_bytes(EIGHT_BILLION, adapters, train, 2) == 8 * end
    # A layer, the next one on its way, the layer's gradients, and these as they travel, beside what is tied.
    deep = Shape(8 * 10**9, 4, 4096, 14336, 1024, 32, outside=1024 * 4096, tied=True)
    layer, end = (8 * 10**9 - 1024 * 4096) // 4, 1024 * 4096
    assert gathered_bytes(deep, model, train, 2) == 4 * (2 * layer + 2 * layer + 2 * end)
    assert gathered_bytes(deep, model, train, 1) == 4 * (layer + 2 * layer + 2 * end)
    assert gathered_bytes(deep, adapters, train, 2) == 4 * (2 * layer + end)
    kept = Train(strategy="fsdp", num_workers=4, sharding={"workers": 2, "keep_gathered": True})
    assert gathered_bytes(SMALL, model, kept, 4) - gathered_bytes(SMALL, model, train, 2) == 4 * 135_000_000
    assert state_bytes(SMALL, model, kept, 4) == 8 * SMALL.parameters


def test_weights_gradients_and_moments_in_fewer_bytes():
    def each(model: dict[str, Any], workers: int = 1, **train: Any) -> float:
        found = state_bytes(LINEAR, Model(path="m", **model), Train(**train), workers)
        return round(found / LINEAR.parameters, 3)

    bfloat16 = {"dtype": "bfloat16"}
    assert each({}, optimizer="adamw_8bit") == 10.031
    assert each(bfloat16, optimizer="adamw_bf16") == 10
    assert each(bfloat16, 8, optimizer="adamw_bf16") == 12  # replicas add gradients up in float32
    assert each(bfloat16, 8, optimizer="adamw_bf16", strategy="fsdp") == 1.25
    assert each({}) == 16 and each({}, ema_decay=0.99) == 20
    assert each({}, 8, ema_decay=0.99, strategy="fsdp") == 2.5
    assert each(bfloat16, optimizer="adamw_8bit_bf16") == 6.031
    assert each({**bfloat16, "lora": {"rank": 1}}) == 2
    # Nine tenths of the weights in 4 bits and a scale in float32 for 64 of them; the others in bfloat16.
    assert each({**bfloat16, "lora": {"rank": 1, "quantization": "nf4"}}) == round(0.9 * 0.5625 + 0.1 * 2, 3)
    assert each({**bfloat16, "lora": {"rank": 1, "quantization": "int8"}}) == round(0.9 * (1 + 4 / 4096) + 0.1 * 2, 3)
    assert each({}, strategy="fsdp", use_gpu=True, offload=True) == 0


def test_some_layers_are_computed_again_and_begin_on_the_host():
    model = Model(path="m", dtype="bfloat16")
    layer, begin = 2 * (18 * 4096 + 4 * 14336), 2 * 4096

    def counted(**train: Any) -> float:
        return bytes_per_token(EIGHT_BILLION, model, Train(**train))

    assert counted() == 32 * layer
    assert counted(activation_checkpointing=True) == layer + 32 * begin
    assert counted(activation_checkpointing=3) == 22 * layer + 11 * begin
    assert counted(activation_checkpointing=True, activation_offload=True, use_gpu=True) == layer


def test_a_checkpoint_holds_weights_moments_and_their_average():
    assert memory.checkpoint_bytes(1000, Train()) == 12_000
    assert memory.checkpoint_bytes(1000, Train(ema_decay=0.9)) == 16_000
    assert memory.checkpoint_bytes(1000, Train(optimizer="adamw_8bit")) == 6031
    assert memory.checkpoint_bytes(1000, Train(optimizer="adamw_bf16")) == 8000


def test_more_workers_checkpointing_and_adapters_make_room():
    with pytest.raises(ConfigError, match=r"finds no room.*141\.0 GiB.*134\.1.*fsdp"):
        fits(EIGHT_BILLION, 141, use_gpu=True)
    sharded = fits(EIGHT_BILLION, 141, num_workers=8, use_gpu=True, strategy="fsdp")
    assert 4096 < sharded <= MOST_TOKENS_GPU
    assert fits(EIGHT_BILLION, 80, num_workers=8, use_gpu=True, strategy="fsdp") < sharded
    checkpointed = fits(EIGHT_BILLION, 80, num_workers=8, use_gpu=True, strategy="fsdp", activation_checkpointing=True)
    assert checkpointed == MOST_TOKENS_GPU
    assert fits(EIGHT_BILLION, 141, model={"lora": {"rank": 8}}, use_gpu=True) > 2048


def test_replicas_do_not_share_their_state():
    with pytest.raises(ConfigError, match="finds no room"):
        fits(EIGHT_BILLION, 141, num_workers=8, use_gpu=True, strategy="ddp")


def test_the_limit_counts_tokens_of_a_micro_batch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "MOST_TOKENS_CPU", 77)
    assert fits(SMALL, 24, model={"dtype": "float32"}) == 77


def test_a_part_of_a_gpu_has_that_part_of_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80 * 2**30))
    assert memory.worker_memory(1, 0.25) == 20 * 2**30
    assert memory.worker_memory(1, 1.0) == 80 * 2**30
