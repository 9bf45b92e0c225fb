"""What a model's tokenizer is, told from its files alone: transformers, which takes seconds, is not needed for it."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_ray.errors import ConfigError
from dpo_ray.model.folders import ADAPTER_CONFIG, DESCRIPTION, content, file_names, matching
from dpo_ray.storage.artifact import digest
from dpo_ray.storage.location import Location

_CONFIG = "tokenizer_config.json"
_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
_WHOLE = "tokenizer.json"
_MARKS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_NO_TOKENIZER = {"config.json", "generation_config.json", ADAPTER_CONFIG}


def tokenizer_hash(folder: Path) -> str:
    """Digest of what turns a dialogue into ids: the files of tokenizer and chat template, by content.

    What the weights and their configuration say is no part of it, but for the model's type, which chooses the class.
    """
    # Vocabularies have many names, so all files count that may be part of a tokenizer.
    found = matching(file_names(folder), *DESCRIPTION)
    names = [n for n in found if n not in _NO_TOKENIZER and not n.endswith(".safetensors.index.json")]
    # Without a tokenizer.json the library makes one of the other files, and each version in its own way.
    made_by = None if (folder / _WHOLE).is_file() else version("transformers")
    of_files = digest(sorted(content(folder, names).items()))
    return digest([of_files, _read(folder / "config.json").get("model_type"), made_by])


def has_template(folder: Path) -> bool:
    """Whether a tokenizer's files may hold a chat template. Raises ConfigError where there is no tokenizer.

    Code that comes with a model may bring its own template: there only the loaded tokenizer tells.
    """
    if not any(file.is_file() for pattern in (_WHOLE, _CONFIG, "*.model", "vocab*") for file in folder.glob(pattern)):
        raise ConfigError(f"There is no tokenizer in {folder}. Save it there with tokenizer.save_pretrained.")
    config = _read(folder / _CONFIG)
    files = [file for pattern in _TEMPLATES for file in folder.glob(pattern)]
    return bool(config.get("chat_template")) or "auto_map" in config or any(file.stat().st_size for file in files)


def read_template(place: str) -> str:
    """The chat template in a file, as model.chat_template names it. Raises ConfigError where it is none."""
    import jinja2

    try:
        text = Location.of(place).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"model.chat_template is {place}, which cannot be read as text ({error}). Name a file with a Jinja "
            "template that every node sees, or a URI; with a job, let it travel along (submit --ship)."
        ) from error
    try:
        # Marks of what the assistant says are transformers' own.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"model.chat_template is {place}, which is no Jinja template: line {error.lineno}: {error.message}. Mend "
            "it, or leave model.chat_template out for the model's own."
        ) from error
    if not text.strip():
        raise ConfigError(f"model.chat_template is {place}, and that file is empty. Leave it out for the model's own.")
    return text


def _read(file: Path) -> dict[str, Any]:
    """A JSON file of a model's folder; empty where there is none. Raises ConfigError."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}). Save the model and its tokenizer again.") from error
    return found if isinstance(found, dict) else {}
