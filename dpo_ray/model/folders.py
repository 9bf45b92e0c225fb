"""Where models lie: finding, fetching, converting, merging and hashing their folders."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from dpo_ray.errors import ConfigError
from dpo_ray.storage.artifact import digest, file_hash
from dpo_ray.storage.location import Location
from dpo_ray.storage.packaged import PACKAGE

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HASHES = "SHA256SUMS"
"""In a folder that was exported here: the sha256 of every other file, as `sha256sum --check` reads it."""
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]


def cache_folder() -> Path:
    """Where converted models are kept between runs: $DPO_RAY_CACHE, or dpo-ray below the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "dpo-ray"
    return Path(os.environ.get("DPO_RAY_CACHE", default)).expanduser()


def is_hub_id(path: str) -> bool:
    """Whether a model's path is looked up on the hub: org/name, and no such folder here."""
    local = Path(path).expanduser()
    there = "://" in path or local.is_absolute() or path.startswith((".", "~")) or local.exists()
    return not there and path.count("/") == 1


def is_made_here(folder: Path) -> bool:
    """Whether resolve made the folder, by converting, copying or merging."""
    return folder.is_relative_to(cache_folder() / "models")


def is_copy(folder: Path, path: str) -> bool:
    """Whether resolve copied the folder, as it is, from this place in an object store."""
    there = "://" in path and not path.startswith(PACKAGE)
    return there and is_made_here(folder) and folder.name.rpartition("-")[0] == Location.of(path).name


def weights_hash(folder: Path) -> str:
    """Digest over the configuration and the weights of a whole model's folder, by content."""
    return hash_of(folder, [folder / "config.json", *folder.glob("*.safetensors")])


def _content(folder: Path) -> str:
    """Digest over everything in a folder that a model or a tokenizer is loaded from, by content."""
    return hash_of(folder, [file for pattern in _FILES for file in folder.glob(pattern)])


def hash_of(folder: Path, files: list[Path]) -> str:
    """Digest over some files of a folder, by content.

    Kept beside the user's cache under the files' names, sizes and times, for large weights are slow to read.
    """
    files = sorted(files)
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    remembered = cache_folder() / "hashes" / digest([str(folder), stats])
    if remembered.is_file():
        return remembered.read_text()
    value = digest([(f.name, file_hash(Location.of(f))) for f in files])
    Location.of(remembered).write_bytes(value.encode())
    return value


def stored_dtype(folder: Path) -> str:
    """The dtype of most of a whole model's weights, as its files say: float32, bfloat16 or float16.

    float32 where it is another one.
    """
    counts: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        counts.update({t["dtype"]: math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__"})
    most = max(counts, key=counts.__getitem__, default="F32")
    return {"BF16": "bfloat16", "F16": "float16"}.get(most, "float32")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The model folder {folder} has no tokenizer that can be loaded ({error}). Save it there "
            "with tokenizer.save_pretrained."
        ) from error
