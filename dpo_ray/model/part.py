"""One process's part of a model that several hold together: of each weight some rows, read from the folder's files alone.

What is read of a file is what is kept: files are mapped, and no weight is ever whole, but for one that the model's class
holds in another form than its files do (as the experts of a layer, stacked): such a one is made whole, cut, and let go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_ray.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEED = 0
"""Of weights that the files lack, which every process must draw alike to hold parts of the same ones."""


@dataclass(frozen=True)
class Part:
    """Which part of every weight a process holds."""

    number: int
    of: int

    def dimension(self, shape: torch.Size) -> int:
        """The one along which a weight is divided: its first one, as torch's FSDP does.

        One that is shorter than there are processes, as that of 8 experts or of a low rank, would leave some of them
        without a part and the others with too much; then the first one that can be divided evenly.
        """
        if shape[0] < self.of:
            return next((n for n, length in enumerate(shape) if length % self.of == 0), 0)
        return 0

    def within(self, shape: torch.Size) -> tuple[slice, ...]:
        """Where the part lies in a weight; empty for the last processes where there are not enough rows."""
        cut = self.dimension(shape)
        each = -(-shape[cut] // self.of)  # as torch.chunk
        first, last = (min(n * each, shape[cut]) for n in (self.number, self.number + 1))
        return (slice(None),) * cut + (slice(first, last),)


@dataclass(frozen=True)
class PartOfModel:
    """A model without weights, and this process's part of each of them."""

    model: PreTrainedModel
    """Its parameters are on the meta device, in their whole shape; its buffers are real."""
    weights: dict[str, Tensor]
    """By name, in float32 on the CPU. Weights that are tied are the same tensor, under each of its names."""


def read_part(folder: Path, part: Part, *, trust_remote_code: bool = False) -> PartOfModel:
    """What from_pretrained makes of a folder, in float32, but of each weight only a part is read.

    Models whose files are quantized are read whole by each process, and cut then, which the log says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    weights: dict[str, Tensor] = {}

    def read(model: Any, state: Any, files: list[str], options: Any, expected: Any = None) -> tuple[Any, Any]:
        if options.hf_quantizer is not None or not all(file.endswith(".safetensors") for file in files):
            say("model", f"{config.model_type}: its files are quantized, so each worker reads all of them")
            return kind._load_pretrained_model(model, state, files, options, expected)
        return _read(model, files, options, part, weights), None

    # Of the same name: transformers goes by it.
    reader = type(kind.__name__, (kind,), {"_load_pretrained_model": staticmethod(read), "__module__": kind.__module__})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        model: Any = reader.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    model.__class__ = kind
    _cut(model, part, weights)  # what has been read or drawn whole
    found: dict[int, Tensor] = {id(p): weights[name] for name, p in model.named_parameters()}
    return PartOfModel(model, {name: found[id(p)] for name, p in model.named_parameters(remove_duplicate=False)})


def _read(model: PreTrainedModel, files: list[str], options: Any, part: Part, weights: dict[str, Tensor]) -> Any:
    """Take the part of every weight that is in the files. Returns what transformers wants to know of a loading."""
    from safetensors import safe_open
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        dot_natural_key,
        rename_source_key,
    )

    opened = [safe_open(file, framework="pt", device="cpu") for file in files]
    stored = {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118
    mapping = options.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    parameters = dict(model.named_parameters(remove_duplicate=False))
    converted: dict[str, dict[str, Any]] = {}  # by the weight that they become: what has to be whole for it
    missing = set(state)
    for name in sorted(stored, key=dot_natural_key):
        target, converter = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, converter = name, None
        parameter = parameters.get(target)
        if converter is None and parameter is not None and torch.Size(stored[name].get_shape()) == parameter.shape:
            weights[target] = stored[name][part.within(parameter.shape)].to(torch.float32)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            missing.discard(target)
        else:
            converted.setdefault(target, {})[name] = stored[name]
    # At least once, if only for what it notes of the model.
    for group in list(converted.values()) or [{}]:
        info, _ = convert_and_load_state_dict_in_model(model, group, replace(options, device_map=None))
        _cut(model, part, weights)
        told = info if not converted or group is next(iter(converted.values())) else _joined(told, info)
    told.missing_keys &= missing
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return told


def _joined(one: Any, other: Any) -> Any:
    one.missing_keys &= other.missing_keys
    one.unexpected_keys |= other.unexpected_keys
    one.mismatched_keys |= other.mismatched_keys
    one.conversion_errors |= other.conversion_errors
    one.error_msgs += other.error_msgs
    return one


def _cut(model: nn.Module, part: Part, weights: dict[str, Tensor]) -> None:
    """Take the part of each parameter that is not on the meta device, and leave it there without its values."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            weights[name] = parameter.detach()[part.within(parameter.shape)].to("cpu", torch.float32, copy=True)
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
            empty._is_hf_initialized = True  # type: ignore[attr-defined]
            set_everywhere(model, {id(parameter): empty})


def set_everywhere(model: nn.Module, instead: dict[int, nn.Parameter]) -> None:
    """Put parameters in the place of others, by the id of these, wherever they are used."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in instead:
                module._parameters[name] = instead[id(parameter)]


@contextmanager
def without_memory(model: nn.Module) -> Iterator[None]:
    """Inside, parameters that are on the meta device pretend to be on the CPU, in their shape and without memory.

    What is put beside them goes to the CPU as well, then, and has values.
    """
    meta = [p for p in model.parameters() if p.is_meta]
    shown = [nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), requires_grad=p.requires_grad) for p in meta]
    set_everywhere(model, {id(p): other for p, other in zip(meta, shown, strict=True)})
    try:
        yield
    finally:
        for p, other in zip(meta, shown, strict=True):
            p.requires_grad_(other.requires_grad)
        set_everywhere(model, {id(other): p for p, other in zip(meta, shown, strict=True)})
