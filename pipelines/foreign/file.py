"""Another trainer's file → ours, as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo_ray.errors import ConfigError
from pipelines.foreign import llama_factory, trl

_READERS = {
    "trl": (trl.read_trl, trl.KNOWN),
    "llama-factory": (llama_factory.read_llama_factory, llama_factory.KNOWN),
}


def imported(file: Path, devices: int | None, data: str | None, whose: str | None) -> str:
    """Our configuration, and below it as a comment what became of each option.

    Args:
        devices: that it is trained on; None: nobody said.
        data: data.train, whatever the file names.
        whose: a name of _READERS; None: as its options say.

    Raises ConfigError where it cannot be read, or be made one of ours.
    """
    given = _read(file)
    if whose is not None and whose not in _READERS:
        raise ConfigError(f"--from {whose} is not known: name one of {', '.join(_READERS)}.")
    read, known = _READERS[whose or _whose(given, file)]
    reading = read(given, str(file), devices, data)
    reading.config()
    return reading.written(known)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file {file}: check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}). Name a text file in UTF-8 that this user may read."
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"{file} is not valid YAML ({' '.join(str(error).split())}). Mend it at the place that is named, or name "
            "the trainer's own YAML file."
        ) from error
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{file} holds no options by name, but {type(given).__name__}: name the trainer's YAML file.")
    return given


def _whose(given: Mapping[str, Any], file: Path) -> str:
    if "base_model" in given or "rl" in given:
        raise ConfigError(f"{file} looks like Axolotl's, which is not read: begin with `dpo-ray init`.")
    if "run" in given and "model" in given:
        raise ConfigError(f"{file} is a configuration of dpo-ray already: `dpo-ray run {file}`.")
    only = llama_factory.KNOWN - trl.KNOWN
    return "llama-factory" if any(key in only for key in given) else "trl"
