"""One process's part of a model that several hold together: of each weight some rows, and no others are read.

What is read of a file is what is kept: files are mapped, and no weight is ever whole, but for one that the model's
class holds in another form than its files do (as the experts of a layer, stacked): such a one is made whole, cut, and
let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """By name, as they are held, on the CPU. Weights that are tied are the same tensor, under each of its names."""


Held = Callable[[str, Tensor], Tensor]
"""What is kept of a part of a weight: given the weight's name, and the part in float32, on the CPU."""


def _as_read(_: str, value: Tensor) -> Tensor:
    return value


def read_part(
    folder: Path,
    part: Part,
    *,
    trust_remote_code: bool = False,
    held: Callable[[PreTrainedModel], Held] = lambda _: _as_read,
) -> PartOfModel:
    """What from_pretrained makes of a folder, in float32, but of each weight only a part is read.

    Models whose files are quantized are read whole by each process, and cut then, which the log says.

    Args:
        held: given the model without its weights, how they are held. Each is brought to it once it is read.
    """
    weights: dict[str, Tensor] = {}

    def take(files: Files) -> Any:
        hold = held(files.model)
        for name in files.plain:
            parameter = files.parameters[name]
            weights[name] = hold(name, files.plain[name][part.within(parameter.shape)].to(torch.float32))
            files.seen(name)
        for group in files.converted:
            files.convert(group)
            _cut(files.model, part, weights, hold)
        return files.told()

    model = without_weights(folder, take, trust_remote_code=trust_remote_code)
    _cut(model, part, weights, held(model))  # what has been read or drawn whole
    found: dict[int, Tensor] = {id(p): weights[name] for name, p in model.named_parameters()}
    return PartOfModel(model, {name: found[id(p)] for name, p in model.named_parameters(remove_duplicate=False)})


def without_weights(folder: Path, take: Callable[[Files], Any], *, trust_remote_code: bool = False) -> PreTrainedModel:
    """What from_pretrained makes of a folder, in float32, but its weights: these are left to `take`.

    take: given the files; returns what they tell of the loading. Parameters that it does not put in are on the meta
        device; those that no file has are drawn, the same ones in every process.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        kind: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))

    def read(model: Any, state: Any, files: list[str], options: Any, expected: Any = None) -> tuple[Any, Any]:
        if options.hf_quantizer is not None or not all(file.endswith(".safetensors") for file in files):
            say("model", f"{config.model_type}: its files are quantized, so each worker reads all of them")
            loaded: tuple[Any, Any] = kind._load_pretrained_model(model, state, files, options, expected)
            return loaded
        return take(Files(model, files, options)), None

    # Of the same name: transformers goes by it.
    reader: Any = type(
        kind.__name__, (kind,), {"_load_pretrained_model": staticmethod(read), "__module__": kind.__module__}
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        model: Any = reader.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    model.__class__ = kind
    return model  # type: ignore[no-any-return]


class Files:
    """The weights in a model's files, by what they are in the model; none is read before it is asked for."""

    def __init__(self, model: PreTrainedModel, files: list[str], options: Any):
        """options: LoadStateDictConfig of transformers."""
        from safetensors import safe_open
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.model: Any = model
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.plain: dict[str, Any] = {}
        """By a weight's name in the model: what is read of by slices, and is that weight."""
        self.converted: list[dict[str, Any]] = []
        """All else, in groups that become a weight, or several: by their names in the files."""
        self._options = replace(options, device_map=None)
        self._mapping = options.weight_mapping or []
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state, groups = model.state_dict(), dict[str, dict[str, Any]]()
        opened: list[Any] = [safe_open(file, framework="pt", device="cpu") for file in files]
        stored = {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118
        for name in sorted(stored, key=dot_natural_key):
            target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if target not in state and name in state:
                target, converter = name, None
            parameter = self.parameters.get(target)
            if converter is None and parameter is not None and list(parameter.shape) == stored[name].get_shape():
                self.plain[target] = stored[name]
            else:
                groups.setdefault(target, {})[name] = stored[name]
        self.converted = list(groups.values())
        self._told = self._load({})

    def seen(self, name: str) -> None:
        """A weight that has been taken, or will be."""
        self.parameters[name]._is_hf_initialized = True  # type: ignore[attr-defined]
        self._told.missing_keys.discard(name)

    def convert(self, group: dict[str, Any]) -> None:
        """Put the weights that a group becomes into the model, whole, on the CPU."""
        told, new = self._told, self._load(group)
        told.missing_keys &= new.missing_keys
        told.unexpected_keys |= new.unexpected_keys
        told.mismatched_keys |= new.mismatched_keys
        told.conversion_errors |= new.conversion_errors
        told.error_msgs += new.error_msgs

    def told(self) -> Any:
        """What transformers wants to know of the loading, once all has been seen or converted."""
        self.model._weight_conversions = [entry for entry in self._mapping if entry.was_used()]
        return self._told

    def _load(self, group: dict[str, Any]) -> Any:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        return convert_and_load_state_dict_in_model(self.model, group, self._options)[0]


def _cut(model: nn.Module, part: Part, weights: dict[str, Tensor], hold: Held) -> None:
    """Take the part of each parameter that is not on the meta device, and leave it there without its values."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            mine = parameter.detach()[part.within(parameter.shape)].to("cpu", torch.float32, copy=True)
            weights[name] = hold(name, mine)
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
            empty._is_hf_initialized = True  # type: ignore[attr-defined]
            set_everywhere(model, {id(parameter): empty})


def set_everywhere(model: nn.Module, instead: dict[int, nn.Parameter]) -> None:
    """Put parameters in the place of others, by the id of these, wherever they are used."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in instead:
                module._parameters[name] = instead[id(parameter)]


def put_whole(model: nn.Module, weights: dict[str, Tensor], device: torch.device) -> None:
    """Give each parameter that is on the meta device its weight, whole, which is taken out of the weights."""
    filled: dict[int, nn.Parameter] = {}
    for name, empty in model.named_parameters():
        if empty.is_meta:
            mine = weights.pop(name.replace(".base_layer.", ".")).to(device)
            filled[id(empty)] = nn.Parameter(mine, requires_grad=empty.requires_grad)
    weights.clear()  # other names of the same ones
    set_everywhere(model, filled)


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
