"""The trained policy as an ordinary folder: a Hugging Face model, or a PEFT adapter, written by all workers together.

Weights go tensor by tensor: each is made whole, brought to the dtype of the folder, and written by the one worker whose
file it belongs to. So no process holds the model a second time, but a layer of it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from dpo_ray.config import Model
from dpo_ray.model.folders import HASHES, load_tokenizer, stored_dtype
from dpo_ray.model.lora import merged_weights, save_adapter
from dpo_ray.model.safetensors_file import SafetensorsFile, num_bytes
from dpo_ray.model.tokenizer_files import read_template
from dpo_ray.storage.artifact import FileEntry, describe_file
from dpo_ray.storage.location import Location
from dpo_ray.training.parallel import Rank, gathered_objects, trained_state, whole_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_BYTES = 4_000_000_000
"""Of tensors in a file at most, but for a tensor that is larger itself: object stores copy 5 GiB by one request."""

_WEIGHTS = "model.safetensors"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_policy(
    target: Location,
    *,
    policy: PreTrainedModel,
    source: Path,
    options: Model,
    dtype: str | None,
    me: Rank,
    base: tuple[str, str | None] | None = None,
    file_bytes: int = FILE_BYTES,
) -> list[FileEntry]:
    """Write the trained model, its tokenizer and its chat template; every rank must call it.

    Without model.lora a Hugging Face folder. With it, by model.lora.export, the adapter as PEFT's folder, or a
    Hugging Face folder of the base with the adapter merged into it. Weights are in safetensors files, each written by
    one rank; SHA256SUMS, written last, has the sha256 of every other file. What an attempt before left there is
    removed first.

    Args:
        policy: as load_policy made it, possibly sharded.
        source: the folder that it was loaded from.
        dtype: float32 or bfloat16; None is the dtype of the source's weights, and float32 for an adapter alone.
        base: what an adapter names as its base, and its revision; left out: the source.
        file_bytes: of tensors in a file, at most.

    Returns the entries of all files, by their names below the target, on rank 0, and none on the others.
    """
    if me.rank == 0:
        target.remove_folder()
    gathered_objects(None, me)  # nobody writes before
    with tempfile.TemporaryDirectory(prefix="dpo-ray-export-") as scratch:
        rest = Path(scratch)
        if options.lora is not None and options.lora.export == "adapter":
            written: list[FileEntry] = []
            state = whole_state(policy)
            if me.rank == 0:
                of_base, revision = base or (str(source), None)
                adapter = {name: _cast(tensor, _DTYPES[dtype or "float32"]) for name, tensor in state.items()}
                save_adapter(rest, policy=policy, state=adapter, base=of_base, revision=revision)
        else:
            into = _DTYPES[dtype or stored_dtype(source)]
            files = _divided(policy, _exported(policy, merged=options.lora is not None, dtype=into), file_bytes)
            written = [entry for part in gathered_objects(_write_mine(target, policy, files, me), me) for entry in part]
            if me.rank == 0:
                _save_config(rest, policy, into)
                _save_index(rest, files)
        if me.rank != 0:
            return []
        template = None if options.chat_template is None else read_template(options.chat_template)
        tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code, chat_template=template)
        tokenizer.save_pretrained(rest)
        return [*written, *_copy_rest(Location.of(rest), target, written)]


@dataclass(frozen=True)
class _Weight:
    """A tensor of the policy as it is exported."""

    like: Tensor
    """Its shape and dtype, on the meta device."""
    whole: Callable[[], Tensor]
    """Makes it; every rank must call it."""


def _exported(policy: PreTrainedModel, *, merged: bool, dtype: torch.dtype) -> dict[str, _Weight]:
    """Every weight that a file of the model holds, by its name in the model without adapters.

    merged: of the base, with the adapters merged into it.
    """

    if merged:
        everything: dict[str, Any] = get_model_state_dict(policy)
        made = merged_weights(policy, everything, _whole)
    else:
        state = trained_state(policy, StateDictOptions(ignore_frozen_params=True))
        # Cast before it travels between the ranks: so half of the bytes do.
        made = {name: (value, partial(_cast_and_whole, value, dtype)) for name, value in state.items()}
    for alias, name in policy.all_tied_weights_keys.items():
        if alias in made:
            tied = made.pop(alias)
            made.setdefault(name, tied)
    for name in policy._keys_to_ignore_on_save or ():
        made.pop(name, None)
    return {
        name: _Weight(
            torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device="meta"), whole
        )
        for name, (value, whole) in made.items()
    }


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _cast_and_whole(value: Tensor, dtype: torch.dtype) -> Tensor:
    return _whole(_cast(value, dtype))


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


@dataclass
class _Part:
    """What one rank writes at a time: weights of the policy, and the files that they make."""

    weights: dict[str, _Weight] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    """Names of weights, in groups that can be converted without the others."""
    files: list[dict[str, Tensor]] = field(default_factory=list)
    """Of each file its tensors, on the meta device."""
    names: list[str] = field(default_factory=list)
    """Of the files."""


def _divided(policy: PreTrainedModel, weights: Mapping[str, _Weight], file_bytes: int) -> list[_Part]:
    """The weights in parts of at most `file_bytes`, but for a group that is larger itself."""
    parts: list[_Part] = []
    room = filled = 0
    for group in _groups(policy, weights):
        converted = _as_saved(policy, {name: weights[name].like for name in group})
        size = sum(map(num_bytes, converted.values()))
        if not parts or size > room:
            parts.append(_Part(files=[{}]))
            room, filled = file_bytes, 0
        room -= size
        part = parts[-1]
        part.weights |= {name: weights[name] for name in group}
        part.groups.append(group)
        for name, like in converted.items():
            if part.files[-1] and filled + num_bytes(like) > file_bytes:
                part.files.append({})
                filled = 0
            part.files[-1][name] = like
            filled += num_bytes(like)
    total = sum(len(part.files) for part in parts)
    number = 0
    for part in parts:
        for _ in part.files:
            number += 1
            stem = _WEIGHTS.removesuffix(".safetensors")
            part.names.append(f"{stem}-{number:05}-of-{total:05}.safetensors" if total > 1 else _WEIGHTS)
    return parts


def _groups(policy: PreTrainedModel, weights: Mapping[str, _Weight]) -> list[list[str]]:
    """The weights in groups, each of which can be brought to the form of the model's files without the others.

    Some models hold several tensors of their files as one, or one as several (transformers converts them as it loads).
    """
    likes = {name: weight.like for name, weight in weights.items()}
    expected = _shapes(_as_saved(policy, likes))
    keys: list[Callable[[str], str]] = [lambda name: name, _layer]
    for key in keys:
        groups: dict[str, list[str]] = {}
        for name in likes:
            groups.setdefault(key(name), []).append(name)
        found: dict[str, torch.Size] = {}
        try:
            for group in groups.values():
                found |= _shapes(_as_saved(policy, {name: likes[name] for name in group}))
        except (RuntimeError, ValueError, LookupError, AttributeError, TypeError):
            continue  # a conversion that lacks what other groups have
        if found == expected:
            return list(groups.values())
    return [list(likes)]


def _layer(name: str) -> str:
    """Up to the first number in a weight's name."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name


def _as_saved(policy: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the model's files name and hold them."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(policy, tensors)
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _write_mine(target: Location, policy: PreTrainedModel, parts: list[_Part], me: Rank) -> list[FileEntry]:
    """Write the files of this rank's parts; every rank makes every weight whole with the others.

    A weight goes into its file when it is whole, so that a rank holds two groups of them at most.
    """
    entries: list[FileEntry] = []
    with ThreadPoolExecutor(1) as writer:
        for number, part in enumerate(parts):
            mine = number % me.world_size == me.rank
            with _files(target, part) if mine else nullcontext() as files:
                write: Future[None] | None = None
                for group in part.groups:
                    made: dict[str, Tensor] = {}
                    for name in group:
                        weight = part.weights[name]
                        value = weight.whole()
                        if mine:
                            made[name] = value.detach().to("cpu", weight.like.dtype)
                        del value
                    if files is not None:
                        if write is not None:
                            write.result()
                        write = writer.submit(files.write, _as_saved(policy, made))
                    del made
                if write is not None:
                    write.result()
            if files is not None:
                entries += files.entries
    return entries


@dataclass
class _Files:
    """The files of a part while they are written."""

    open: dict[str, SafetensorsFile]
    """Of each tensor, the file that it belongs to."""
    entries: list[FileEntry] = field(default_factory=list)
    """Once they are written."""

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Tensors are taken out as they are written."""
        while tensors:
            name, tensor = tensors.popitem()
            self.open[name].write(name, tensor)


@contextmanager
def _files(target: Location, part: _Part) -> Iterator[_Files]:
    files = _Files({})
    with ExitStack() as closing:
        written = []
        for name, tensors in zip(part.names, part.files, strict=True):
            path = closing.enter_context(_local(target / name))
            file = closing.enter_context(SafetensorsFile.create(path, tensors))
            files.open |= dict.fromkeys(tensors, file)
            written.append((name, path, file))
        yield files
        for name, path, file in written:  # before they go to their places
            file.close()
            files.entries.append(describe_file(Location.of(path)).model_copy(update={"name": name}))


@contextmanager
def _local(place: Location) -> Iterator[Path]:
    """A local file to fill, which then goes to its place."""
    if place.is_local:
        Path(place.uri).parent.mkdir(parents=True, exist_ok=True)
    beside = Path(place.uri).parent if place.is_local else None  # so that it is renamed, and not copied
    with tempfile.TemporaryDirectory(prefix=".dpo-ray-export-", dir=beside) as scratch:
        path = Path(scratch) / place.name
        yield path
        if place.is_local:
            with path.open("rb") as written:
                os.fsync(written.fileno())
            path.replace(place.uri)
        else:
            Location.of(path).copy_to(place)


def _save_config(folder: Path, policy: PreTrainedModel, dtype: torch.dtype) -> None:
    """What PreTrainedModel.save_pretrained writes beside the weights, with the dtype that these have."""
    from transformers.dynamic_module_utils import custom_object_save

    config: Any = copy.deepcopy(policy.config)
    config.architectures = [type(policy).__name__.removeprefix("FSDP")]
    for one in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if one is not None:
            one.dtype = dtype
    if policy.is_remote_code():
        custom_object_save(policy, folder, config=config)
    config.save_pretrained(folder)
    if policy.can_generate():
        policy.generation_config.save_pretrained(folder)


def _save_index(folder: Path, parts: list[_Part]) -> None:
    """Which file has which tensor, where there are several files."""
    files = {name: file for part in parts for name, file in zip(part.names, part.files, strict=True)}
    if len(files) < 2:
        return
    total = sum(num_bytes(like) for file in files.values() for like in file.values())
    places = {tensor: name for name, file in files.items() for tensor in file}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{_WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copy_rest(rest: Location, target: Location, written: list[FileEntry]) -> list[FileEntry]:
    """Copy the files beside the weights, and write the hashes of all. Returns the entries of what is written here."""
    entries = [describe_file(rest / name).model_copy(update={"name": name}) for name in rest.names()]
    for entry in entries:
        (rest / entry.name).copy_to(target / entry.name)
    lines = [f"{entry.sha256}  {entry.name}\n" for entry in sorted([*written, *entries], key=lambda e: e.name)]
    sums = "".join(lines).encode()
    (target / HASHES).write_bytes(sums)
    return [*entries, FileEntry(name=HASHES, rows=None, bytes=len(sums), sha256=hashlib.sha256(sums).hexdigest())]
