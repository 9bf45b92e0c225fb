"""A model's path → the local folder of a whole model: found, fetched, converted or merged, each made once.

It can be imported without torch and transformers.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_ray.config import Model
from dpo_ray.errors import ConfigError
from dpo_ray.model.folders import (
    _FILES,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    _content,
    cache_folder,
    is_hub_id,
    load_tokenizer,
    weights_hash,
)
from dpo_ray.model.tokenizer_files import tokenizer_hash
from dpo_ray.storage.artifact import digest, file_hash
from dpo_ray.storage.location import Location
from dpo_ray.storage.packaged import PACKAGE, package_file

_DOWNLOADS = 4  # at once


@dataclass(frozen=True)
class ModelFolder:
    """The local folder of a whole model."""

    path: Path
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Given to the chat template."""

    @classmethod
    def of(cls, model: Model) -> ModelFolder:
        """Found, fetched, converted or merged, as resolve does. Raises ConfigError."""
        return cls(resolve(model.path, model.revision), model.trust_remote_code, model.template_arguments)

    def tokenizer(self) -> Any:
        """Raises ConfigError where none can be loaded."""
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    def weights_hash(self) -> str:
        """Digest over the configuration and the weights, by content."""
        return weights_hash(self.path)

    def tokenizer_hash(self) -> str:
        """Digest of what turns a dialogue into ids: tokenizer, chat template and its arguments, by content."""
        found = tokenizer_hash(self.path)
        return digest([found, self.template_arguments]) if self.template_arguments else found

    def config(self) -> dict[str, Any]:
        """What stands in config.json; defaults of the model's class are not in it."""
        found: dict[str, Any] = json.loads((self.path / "config.json").read_bytes())
        return found


def resolve(path: str, revision: str | None = None) -> Path:
    """The local folder of a whole model: a folder as it is; a GGUF file, a URI or a hub id as a copy made once.

    A PEFT adapter, wherever it lies, becomes a folder of its base model with the adapter merged into it, made once.

    Raises ConfigError where there is nothing to load.
    """
    return _whole(_located(path, revision), path, within=())


def _located(path: str, revision: str | None) -> Path:
    """The local folder of a model or an adapter."""
    local = Path(path).expanduser()
    if revision is not None and (path.startswith(PACKAGE) or local.exists()):
        raise ConfigError(
            f"model.revision is {revision}, but model.path={path} is local, and local files have no revisions. Leave "
            "model.revision out, or name a hub id."
        )
    if path.startswith(PACKAGE):
        return converted_gguf(package_file(path))
    if local.suffix == ".gguf" and local.is_file():
        return converted_gguf(local)
    if "://" in path:
        return _fetched(Location.of(path))
    if local.is_dir():
        return local.absolute()
    if not is_hub_id(path):
        raise ConfigError(
            f"model.path is {path}, and there is no such folder. Name a Hugging Face model folder, a "
            ".gguf file or a hub id such as org/name."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_FILES))
    except Exception as error:
        raise ConfigError(
            f"model.path is {path}: it is no local folder, and the hub did not give it ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Check the name, the network and the access rights, or name a "
            "folder."
        ) from error


def _whole(folder: Path, path: str, within: tuple[Path, ...]) -> Path:
    """The folder itself where it holds a whole model, or that of the merged model where it holds an adapter.

    within: the adapters whose base it is.
    """
    weights = [f for f in folder.glob("*.safetensors") if f.name != ADAPTER_WEIGHTS]
    whole = (folder / "config.json").is_file() and bool(weights)
    if not (folder / ADAPTER_CONFIG).is_file():
        if not whole:
            raise ConfigError(
                f"model.path is {path}, but that folder has no config.json with *.safetensors beside it. Name a "
                "folder written by save_pretrained; weights in pickle files are not loaded."
            )
        return folder
    if whole:
        raise ConfigError(
            f"model.path is {path}, but that folder holds a whole model and an adapter as well ({ADAPTER_CONFIG}), and "
            "libraries disagree on what that means. Move one of the two into a folder of its own, and name the other."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(
            f"model.path is {path}, which is an adapter's folder without {ADAPTER_WEIGHTS}. Save the adapter with "
            "save_pretrained and safetensors; weights in pickle files are not loaded."
        )
    if folder in within:
        raise ConfigError(f"The adapter {folder} names itself as the base model.")
    return _merged(folder, (*within, folder))


def _merged(adapter: Path, within: tuple[Path, ...]) -> Path:
    """An adapter's base model with the adapter merged into it, made once and kept in the cache folder."""
    base = _base_of(adapter, within)
    target = cache_folder() / "models" / f"{adapter.name}-merged-{digest([_content(adapter), _content(base)])}"
    with made_once(target) as partial:
        if partial is not None:
            from dpo_ray.model.lora import merge

            merge(base, adapter).save_pretrained(partial)
            has_tokenizer = (adapter / "tokenizer_config.json").is_file()
            load_tokenizer(adapter if has_tokenizer else base).save_pretrained(partial)
    return target


def _base_of(adapter: Path, within: tuple[Path, ...]) -> Path:
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
        name, revision = config["base_model_name_or_path"] or "", config.get("revision")
    except (ValueError, KeyError, TypeError):
        name = ""
    if not name:
        raise ConfigError(
            f"The adapter {adapter} does not say which model it belongs to. Write the folder or hub id of its base "
            f"model into its {ADAPTER_CONFIG}, as base_model_name_or_path."
        )
    beside = adapter / name
    path = str(beside.resolve()) if "://" not in name and beside.exists() else name
    try:
        return _whole(_located(path, revision if is_hub_id(path) else None), path, within)
    except ConfigError as error:
        raise ConfigError(
            f"The adapter {adapter} belongs to the base model {name}, which cannot be loaded. {error} Or write the "
            f"place of the base model into the adapter's {ADAPTER_CONFIG}, as base_model_name_or_path."
        ) from error


def converted_gguf(gguf: Path) -> Path:
    """A GGUF file as a Hugging Face folder in float32, made once and kept in the cache folder.

    Safe when several processes ask at the same time: one converts, the others wait for it.
    """
    target = cache_folder() / "models" / f"{gguf.stem}-{file_hash(Location.of(gguf))[:12]}"
    with made_once(target) as partial:
        if partial is not None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            # The tensors are dequantized already; transformers would otherwise refuse to save them.
            model.hf_quantizer = None
            del model.config.quantization_config
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    return target


def _fetched(remote: Location) -> Path:
    """A folder of an object store, copied once into the cache folder; a changed one is copied again."""
    files = _listed(remote)
    if not any(name in ("config.json", ADAPTER_CONFIG) for name, _, _ in files):
        raise ConfigError(
            f"model.path is {remote}, and there is no config.json and no {ADAPTER_CONFIG} in it. Name a folder written "
            "by save_pretrained."
        )
    target = cache_folder() / "models" / f"{remote.name}-{digest([remote.uri, files])}"
    with made_once(target) as partial:
        if partial is not None:
            copy = [((remote / name), Location.of(partial / name)) for name, _, _ in files]
            with ThreadPoolExecutor(_DOWNLOADS) as threads:
                list(threads.map(lambda pair: pair[0].copy_to(pair[1]), copy))
            if _listed(remote) != files:
                raise ConfigError(
                    f"model.path is {remote}, and its files changed while they were copied. Run again when whoever "
                    "writes there has finished."
                )
    return target


def _listed(remote: Location) -> list[tuple[str, int, int]]:
    """Path, bytes and time of each file in a folder of an object store and below it."""
    below = f"{remote.uri}/"
    return [(remote.same_store(info.path).uri.removeprefix(below), info.size, info.mtime_ns) for info in remote.files()]


@contextmanager
def made_once(target: Path) -> Iterator[Path | None]:
    """A folder to fill, which becomes the target when the block ends well; None where the target exists.

    Several processes may ask at the same time: one fills it, the others wait.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            yield None
            return
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
        try:
            yield partial
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
