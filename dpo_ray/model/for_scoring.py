"""A model that only scores: its weights go straight to the device, in the dtype that it computes in.

Of a model that is larger than the device, those of the decoder layers stay in the model's files, and each layer's are
brought when it computes. Nothing is exchanged for it, so that each scorer works by itself; what is computed is the
same, bit for bit. A pass over the files serves all tokens of a batch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_ray.config import Quantization
from dpo_ray.model.folders import WEIGHTS
from dpo_ray.model.part import Files, set_everywhere, without_weights
from dpo_ray.model.policy import CompletionScorer, decoder_layers, prepare, quantized_weights, use_packed_attention
from dpo_ray.model.quantization import dequantize, quantize
from dpo_ray.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_USABLE = 0.8  # of the memory; the rest is for what is computed
_GIB = 2**30


def load_for_scoring(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> CompletionScorer:
    """In eval mode, without gradients, on the packed attention where it can serve. Raises as load_policy does.

    Args:
        quantization: as what weights are scored with that a training holds quantized; here they are in dtype.
    """
    weights, memory = weight_bytes(folder, dtype), memory_of(device)
    in_files = weights > _USABLE * memory
    if in_files:
        say(
            "model",
            f"its weights are {weights / _GIB:.1f} GiB, and there are {memory / _GIB:.1f}: those of each layer are "
            "read from its files when it computes",
        )
    model = _load(
        folder, device, dtype, trust_remote_code=trust_remote_code, in_files=in_files, quantization=quantization
    )
    scorer = CompletionScorer(model)
    use_packed_attention(scorer.eval(), device, dtype)
    return scorer


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Of a model's weights once they are in a dtype, as the headers of its files tell."""
    values = 0
    for file in folder.glob(WEIGHTS):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        values += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return values * dtype.itemsize


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _load(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool,
    in_files: bool,
    quantization: Quantization | None,
) -> PreTrainedModel:
    found: list[_Layers] = []
    rounded: list[_Rounding] = []
    done: dict[int, nn.Parameter] = {}

    def brought(model: PreTrainedModel, name: str, value: Tensor) -> Tensor:
        if not rounded:
            rounded.append(_Rounding(quantized_weights(model, quantization), quantization))
        return rounded[0].of(name, value, device, dtype)

    def put(model: PreTrainedModel, name: str, parameter: nn.Parameter, value: Tensor) -> None:
        whole = nn.Parameter(brought(model, name, value), requires_grad=False)
        whole._is_hf_initialized = True  # type: ignore[attr-defined]
        set_everywhere(model, {id(parameter): whole})
        done[id(whole)] = whole

    def take(files: Files) -> Any:
        model = files.model
        layers = decoder_layers(model, wanted_by="a model larger than the memory") if in_files else []
        inside = {id(p) for layer in layers for p in layer.parameters()}
        later = _Layers(files, partial(brought, model))
        for name in files.plain:
            if id(files.parameters[name]) in inside:
                later.empty[name] = files.parameters[name]
            else:
                put(model, name, files.parameters[name], files.plain[name][...])
            files.seen(name)
        for group in files.converted:
            files.convert(group)
            for name, parameter in list(model.named_parameters()):
                if not parameter.is_meta and id(parameter) not in done:
                    before = files.parameters[name]
                    if id(before) in inside:
                        later.groups[name] = group
                        later.empty[name] = before
                        set_everywhere(model, {id(parameter): before})
                    else:
                        put(model, name, parameter, parameter.detach())
        found.append(later)
        return files.told()

    model = without_weights(folder, take, trust_remote_code=trust_remote_code)
    for name, parameter in list(model.named_parameters()):  # of quantized files, or drawn
        if not parameter.is_meta and id(parameter) not in done:
            put(model, name, parameter, parameter.detach())
    for name, buffer in list(model.named_buffers()):
        place, _, last = name.rpartition(".")
        model.get_submodule(place)._buffers[last] = buffer.to(device)
    prepare(model)
    for later in found if in_files else ():
        later.hook()
    return model


@dataclass(frozen=True)
class _Rounding:
    """Which weights are scored with as a training computes with them that holds them quantized."""

    names: set[str]
    quantization: Quantization | None

    def of(self, name: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.quantization is None or name not in self.names:
            return value.to(device, dtype)
        packed = quantize(value.to("cpu", torch.float32), self.quantization).to(device)
        return dequantize(packed, self.quantization, value.shape[1], dtype)


class _Layers:
    """Where the weights of decoder layers are."""

    def __init__(self, files: Files, brought: Callable[[str, Tensor], Tensor]):
        self.files, self.brought = files, brought
        self.empty: dict[str, nn.Parameter] = {}
        """By a weight's name, the parameter that is in its place while its layer does not compute."""
        self.groups: dict[str, dict[str, Any]] = {}
        """Of those that are converted, what they are made of."""

    def hook(self) -> None:
        """Have each layer's weights read before it computes, and let go after it."""
        for name, layer in self._layers():
            mine = [weight for weight in self.empty if weight.startswith(f"{name}.")]
            layer.register_forward_pre_hook(lambda *_, mine=mine: self.bring(mine))
            layer.register_forward_hook(lambda *_, mine=mine: self.let_go(mine), always_call=True)

    def _layers(self) -> Iterable[tuple[str, nn.Module]]:
        layers = {id(layer) for layer in decoder_layers(self.files.model, wanted_by="a model larger than the memory")}
        return [(name, module) for name, module in self.files.model.named_modules() if id(module) in layers]

    def bring(self, names: Iterable[str]) -> None:
        done: list[dict[str, Any]] = []
        for name in names:
            if name in self.groups:
                if self.groups[name] not in done:
                    done.append(self.groups[name])
                    self.files.convert(self.groups[name])
                value = self.files.model.get_parameter(name).detach()
            else:
                value = self.files.plain[name][...]
            self._set(name, nn.Parameter(self.brought(name, value), requires_grad=False))

    def let_go(self, names: Iterable[str]) -> None:
        for name in names:
            self._set(name, self.empty[name])

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        place, _, last = name.rpartition(".")
        self.files.model.get_submodule(place)._parameters[last] = parameter
