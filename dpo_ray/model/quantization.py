"""Frozen weights in 4 or 8 bits, by bitsandbytes: how they are packed, and the linear layer that computes with them.

Of a weight [rows, columns] each row is a row of bytes: its codes, then its scales in float32. Nothing of a row depends
on another one, so that a worker's rows are quantized as they are in the whole weight; and bytes are neither cast nor
rounded where FSDP gathers them. Weights are quantized on the CPU everywhere, to the same codes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpo_ray.config import Quantization
from dpo_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64
"""Values of a row that share a scale in nf4, as in QLoRA (arXiv:2305.14314). In int8 a row has one."""

_SCALE = 4  # bytes


def quiet_bitsandbytes() -> None:
    """When it is loaded it warns of a package for matrix products that are not used here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@cache
def _library() -> Any:
    quiet_bitsandbytes()
    import bitsandbytes.functional

    return bitsandbytes.functional


def packed_columns(columns: int, kind: Quantization) -> int:
    """Bytes of a row."""
    if kind == "int8":
        return columns + _SCALE
    return math.ceil(columns / BLOCK) * (BLOCK // 2 + _SCALE)


def quantize(weight: Tensor, kind: Quantization) -> Tensor:
    """[rows, columns], float32, on the CPU → [rows, packed_columns] uint8."""
    rows, columns = weight.shape
    if not rows:
        return torch.empty(0, packed_columns(columns, kind), dtype=torch.uint8)
    if kind == "int8":
        codes, scales, _ = _library().int8_vectorwise_quant(weight.to(torch.float16))
        codes = codes.view(torch.uint8)
    else:
        blocks = math.ceil(columns / BLOCK)
        whole = functional.pad(weight, (0, blocks * BLOCK - columns)).contiguous()
        codes, state = _library().quantize_4bit(whole, blocksize=BLOCK, quant_type=kind)
        codes, scales = codes.view(rows, -1), state.absmax
    return torch.cat([codes, scales.view(rows, -1).to(torch.float32).view(torch.uint8)], dim=1)


def dequantize(packed: Tensor, kind: Quantization, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, packed_columns] uint8 → [rows, columns], the values that are computed with."""
    rows = len(packed)
    if not rows:
        return torch.empty(0, columns, dtype=dtype, device=packed.device)
    scale_bytes = _SCALE if kind == "int8" else math.ceil(columns / BLOCK) * _SCALE
    codes, scales = (part.contiguous() for part in packed.split([packed.shape[1] - scale_bytes, scale_bytes], dim=1))
    scales = scales.view(torch.float32).flatten()
    if kind == "int8":
        values: Tensor = _library().int8_vectorwise_dequant(codes.view(torch.int8), scales)
        return values.to(dtype)
    shape = torch.Size([rows, math.ceil(columns / BLOCK) * BLOCK])
    state = _library().QuantState(
        absmax=scales,
        shape=shape,
        code=_library().get_4bit_type(kind, device=packed.device),
        blocksize=BLOCK,
        quant_type=kind,
        dtype=dtype,
    )
    whole: Tensor = _library().dequantize_4bit(codes.view(-1, 1), state)
    return whole[:, :columns]


class QuantizedLinear(nn.Module):
    """A linear layer with a frozen weight in few bits, made whole in the input's dtype whenever it computes."""

    def __init__(self, linear: nn.Linear, kind: Quantization):
        """Its weight has no values yet: on the meta device."""
        super().__init__()
        self.kind = kind
        self.in_features, self.out_features = linear.in_features, linear.out_features
        empty = torch.empty(
            linear.out_features, packed_columns(linear.in_features, kind), dtype=torch.uint8, device="meta"
        )
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.bias = linear.bias

    def whole(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that packed bytes of it are."""
        return dequantize(packed, self.kind, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        product: Any = _Product
        return product.apply(x, self.weight, self.bias, self.kind, self.in_features)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """A linear layer that keeps its packed weight for the backward pass, and not the one that it computes with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, kind: Quantization, columns: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.kind, ctx.columns = kind, columns
        return functional.linear(x, dequantize(packed, kind, columns, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None, None]:
        [gradient] = gradients
        (packed,) = ctx.saved_tensors
        of_input = gradient @ dequantize(packed, ctx.kind, ctx.columns, gradient.dtype)
        return of_input, None, None, None, None


def linear_layers(model: PreTrainedModel, layers: list[nn.Module]) -> Iterator[tuple[str, nn.Linear]]:
    """Those in the decoder layers, by their names in the model; adapters are none of them."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) in inside and ".lora_" not in name:
            yield name, module


def require_quantizable(model: PreTrainedModel, layers: list[nn.Module], kind: Quantization) -> None:
    """Raises ConfigError where most weights of the decoder layers are in no linear layer, as of stacked experts."""
    there = sum(p.numel() for layer in layers for p in layer.parameters())
    linear = sum(module.weight.numel() for _, module in linear_layers(model, layers))
    if 2 * linear < there:
        raise ConfigError(
            f"model.lora.quantization={kind}: of the {there} weights in the decoder layers of {type(model).__name__}, "
            f"{linear} are in linear layers. The others, as those of experts that are held together, would not be "
            "quantized. Leave model.lora.quantization out."
        )


def use_quantized_layers(model: PreTrainedModel, layers: list[nn.Module], kind: Quantization) -> None:
    """Put quantized layers, without values, in the place of the linear ones; with adapters, below these."""
    for name, linear in list(linear_layers(model, layers)):
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, QuantizedLinear(linear, kind))
