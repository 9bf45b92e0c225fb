"""Folders of models: which files are in them, by content, in which dtype."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dpo_ray.errors import ConfigError
from dpo_ray.model.cache import cache_folder
from dpo_ray.storage.artifact import digest, file_hash
from dpo_ray.storage.location import Location

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = "*.safetensors"
DESCRIPTION = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "additional_chat_templates/*.jinja")
"""Names of all that a model is loaded from but its weights: configuration, tokenizer, chat templates, code."""
HASHES = "SHA256SUMS"
"""In a folder that was exported here: the sha256 of every other file, as `sha256sum --check` reads it."""


def matching(names: Iterable[str], *patterns: str) -> list[str]:
    """The names that fit one of the patterns, in which * crosses no slash; in order."""
    return sorted(n for n in names if any(fnmatchcase(n, p) and n.count("/") == p.count("/") for p in patterns))


def file_names(folder: Path) -> list[str]:
    """Names of what a model is loaded from, in a local folder."""
    found = {file for pattern in (*DESCRIPTION, WEIGHTS) for file in folder.glob(pattern) if file.is_file()}
    return sorted(str(file.relative_to(folder)) for file in found)


def content(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name → sha256 of some files of a local folder.

    Kept in the cache folder by the files' places, sizes and times, for large weights are slow to read.
    """
    return {name: _sha256(folder / name) for name in names}


def _sha256(file: Path) -> str:
    stat = file.stat()
    remembered = (
        cache_folder()
        / "hashes"
        / digest(
            # Times of content may be set, as in images that are built reproducibly; that of the last change may not.
            [str(file.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        )
    )
    if remembered.is_file():
        return remembered.read_text()
    value = file_hash(Location.of(file))
    Location.of(remembered).write_bytes(value.encode())
    return value


def parse_hashes(text: str) -> dict[str, str]:
    """Name → sha256, of the lines of a file HASHES."""
    lines = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in text.splitlines()]
    return {line[2]: line[1] for line in lines if line is not None}


def require_readable(names: Iterable[str], place: str) -> bool:
    """Whether the files of a folder are an adapter, and not a whole model.

    Args:
        place: what the folder is called, for the message.

    Raises ConfigError where they are neither, or both.
    """
    known = set(names)
    weights = [name for name in matching(known, WEIGHTS) if name != ADAPTER_WEIGHTS]
    whole = CONFIG in known and bool(weights)
    if ADAPTER_CONFIG not in known:
        if not whole:
            raise ConfigError(
                f"model.path is {place}, but that folder has no config.json with *.safetensors beside it. Name a "
                "folder written by save_pretrained; weights in pickle files are not loaded."
            )
        return False
    if whole:
        raise ConfigError(
            f"model.path is {place}, but that folder holds a whole model and an adapter as well ({ADAPTER_CONFIG}), "
            "and libraries disagree on what that means. Move one of the two into a folder of its own, and name the "
            "other."
        )
    if ADAPTER_WEIGHTS not in known:
        raise ConfigError(
            f"model.path is {place}, which is an adapter's folder without {ADAPTER_WEIGHTS}. Save the adapter with "
            "save_pretrained and safetensors; weights in pickle files are not loaded."
        )
    return True


def stored_dtype(folder: Path) -> str:
    """The dtype of most of a whole model's weights, as its files say: float32, bfloat16 or float16.

    float32 where it is another one.
    """
    counts: Counter[str] = Counter()
    for file in folder.glob(WEIGHTS):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                counts[tensor["dtype"]] += math.prod(tensor["shape"])
    most = max(counts, key=counts.__getitem__, default="F32")
    return {"BF16": "bfloat16", "F16": "float16"}.get(most, "float32")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False, chat_template: str | None = None) -> Any:
    """The tokenizer of a model folder, with another chat template where one is given. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The model folder {folder} has no tokenizer that can be loaded ({error}). Save it there "
            "with tokenizer.save_pretrained."
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
