"""Frozen weights in 4 and 8 bits compute what the values do that they stand for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3MoeConfig

from dpo_ray.config import LoRA, Quantization
from dpo_ray.errors import ConfigError
from dpo_ray.model import for_scoring, libraries
from dpo_ray.model.for_scoring import load_for_scoring, weight_bytes
from dpo_ray.model.part import Part, put_whole
from dpo_ray.model.policy import (
    CompletionScorer,
    compile_layers,
    load_part_of_policy,
    load_policy,
    quantized_weights,
    use_packed_attention,
)
from dpo_ray.model.quantization import QuantizedLinear, dequantize, packed_columns, quantize
from tests.training import random_pairs
from tests.unit.model.test_part import MODELS, saved

CPU = torch.device("cpu")
KINDS: list[Quantization] = ["nf4", "int8"]
ERROR = {"nf4": 0.1, "int8": 0.01}
"""Mean error of a normal weight, of its mean size, is .091 and .008."""

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def weight(rows: int = 96, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def loaded(folder: Path, kind: Quantization) -> CompletionScorer:
    found = load_part_of_policy(folder, Part(0, 1), lora=LoRA(rank=2, quantization=kind))
    put_whole(found.model, found.weights, CPU)
    scorer = CompletionScorer(found.model)
    use_packed_attention(scorer)
    return scorer


def with_dequantized_weights(folder: Path, kind: Quantization) -> CompletionScorer:
    """Of the same adapters on a model of float32, whose weights are what the quantized ones stand for."""
    plain = load_policy(folder)
    names = quantized_weights(plain, kind)
    values = {
        name: dequantize(quantize(p.detach(), kind), kind, p.shape[1], torch.float32)
        for name, p in plain.named_parameters()
        if name in names
    }
    assert len(values) == 14
    policy = load_policy(folder, lora=LoRA(rank=2))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if (value := values.get(name.replace(".base_layer.", "."))) is not None:
                parameter.copy_(value)
    return CompletionScorer(policy)


def moved(scorer: CompletionScorer) -> dict[str, nn.Parameter]:
    """Its adapters, no longer at their start, where they change nothing."""
    random = torch.Generator().manual_seed(1)
    found = {name: p for name, p in scorer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in found.values():
            p.copy_(torch.randn(p.shape, generator=random) * 0.1)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [128, 100])
def test_rows_are_quantized_by_themselves(kind: Quantization, columns: int):
    whole = weight(columns=columns)
    packed = quantize(whole, kind)
    assert packed.shape == (96, packed_columns(columns, kind)) and packed.dtype == torch.uint8
    parts = [quantize(part, kind) for part in (whole[:50], whole[50:], whole[:0])]
    assert torch.equal(torch.cat(parts), packed)
    values = dequantize(packed, kind, columns, torch.float32)
    assert (values - whole).abs().mean() < ERROR[kind] * whole.abs().mean()
    assert dequantize(packed[:0], kind, columns, torch.float32).shape == (0, columns)
    in_bfloat16 = dequantize(packed, kind, columns, torch.bfloat16)
    assert torch.equal(in_bfloat16, values.to(torch.bfloat16))


def test_bytes_of_a_weight():
    assert packed_columns(4096, "nf4") / 4096 == 0.5 + 4 / 64
    assert packed_columns(4096, "int8") == 4096 + 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_what_its_weight_stands_for(kind: Quantization, bias: bool, dtype: torch.dtype):
    linear = nn.Linear(128, 96, bias=bias)
    if bias:
        linear.bias.data = linear.bias.data.to(dtype)
    layer = QuantizedLinear(linear, kind)
    layer.weight = nn.Parameter(quantize(weight(), kind), requires_grad=False)
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    again = x.detach().clone().requires_grad_()
    expected = functional.linear(again, layer.whole(layer.weight, dtype), linear.bias)
    found = layer(x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None and again.grad is not None and torch.equal(x.grad, again.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_computes_what_one_of_the_same_values_does_and_so_do_its_gradients(kind: Quantization, tmp_path: Path):
    folder = saved(MODELS["llama"], tmp_path)
    found, expected = loaded(folder, kind).train(), with_dequantized_weights(folder, kind).train()
    adapters, same = moved(found), moved(expected)
    assert adapters.keys() == same.keys() and found.packs
    batch = found.collate(random_pairs(3, vocabulary=101))
    logprobs, others = found(batch).logprobs, expected(batch).logprobs
    assert torch.equal(logprobs, others)
    logprobs.sum().backward()
    others.sum().backward()
    for name, p in adapters.items():
        assert p.grad is not None and torch.equal(p.grad, same[name].grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_scored_with_the_same_weights(
    kind: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = saved(MODELS["llama"], tmp_path)
    policy = loaded(folder, kind).eval()
    batch = policy.collate(random_pairs(3, vocabulary=101))
    with torch.inference_mode():
        expected = policy(batch).logprobs
        held = load_for_scoring(folder, CPU, torch.float32, quantization=kind)
        assert torch.equal(held(batch).logprobs, expected)
        monkeypatch.setattr(for_scoring, "memory_of", lambda device: weight_bytes(folder, torch.float32))
        in_files = load_for_scoring(folder, CPU, torch.float32, quantization=kind)
        for _ in range(2):
            assert torch.equal(in_files(batch).logprobs, expected)
    plain = load_for_scoring(folder, CPU, torch.float32)
    with torch.inference_mode():
        assert (plain(batch).logprobs - expected).abs().max() > 1e-4  # far above rounding: it is no other model


def test_compiled_layers_compute_the_same(tmp_path: Path):
    folder = saved(MODELS["llama"], tmp_path)
    eager, compiled = loaded(folder, "nf4"), loaded(folder, "nf4")
    compile_layers(compiled.model, backend="aot_eager")
    adapters, same = moved(eager), moved(compiled)
    batch = eager.collate(random_pairs(3, vocabulary=101))
    for scorer in (eager, compiled):
        scorer(batch).logprobs.sum().backward()
    for name, p in adapters.items():
        torch.testing.assert_close(p.grad, same[name].grad)


def test_experts_that_are_held_together_are_refused(tmp_path: Path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 101, "moe_intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    folder = saved(Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2), tmp_path)
    with pytest.raises(ConfigError, match=r"model\.lora\.quantization=nf4: of the \d+ weights .* Leave .* out"):
        load_part_of_policy(folder, Part(0, 1), lora=LoRA(quantization="nf4"))


def test_without_its_library_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(libraries, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=r"model\.lora\.quantization=int8 needs bitsandbytes.*dpo-ray\[memory\]"):
        libraries.require_bitsandbytes("int8")
    with pytest.raises(ConfigError, match=r"train\.optimizer=adamw_8bit needs torchao.*dpo-ray\[memory\]"):
        libraries.require_torchao("adamw_8bit")
    libraries.require_bitsandbytes(None)
    libraries.require_torchao("adamw")
