"""YAML file and overrides → the tree, or one paragraph that says what is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from dpo_ray.config.section import Section
from dpo_ray.config.tree import Config
from dpo_ray.config.yaml_text import read_yaml
from dpo_ray.errors import ConfigError

Overrides = Sequence[str] | Mapping[str, Any]
"""dotted.key=value, as -o takes them; or dotted key → value."""


def load_config(path: str | Path, overrides: Overrides | None = None) -> Config:
    """Read a YAML file, apply overrides and validate the tree.

    Raises ConfigError, in one paragraph that names each offending key, its value and the way out.
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"There is no configuration file {path}: check the path, or start from a file in pipelines/configs."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read ({error}). Name a text file in UTF-8 that this user may "
            "read."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is not valid YAML ({' '.join(str(error).split())}). Mend it at the line and column that are named."
        ) from error
    except ValueError as error:  # what looks like a date is made one, and some are none
        raise ConfigError(f"{path} holds a date that there is not: {error}. Write it as in 2026-11-01.") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds {type(tree).__name__} and no sections: write a mapping with run, model and data, as in "
            "pipelines/configs."
        )
    return overridden(tree, overrides, source=str(path))


def overridden(tree: dict[str, Any], overrides: Overrides | None, source: str) -> Config:
    """Validate a tree of plain values after overrides, which are put into it. Raises ConfigError."""
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            put(tree, key, deepcopy(value), source=f"the override {key}")
        return parse_config(tree, source=f"{source} with overrides" if overrides else source)
    for override in overrides or []:
        put(tree, *told(override), source=f"-o {override}")
    return parse_config(tree, source=f"{source} with what -o sets" if overrides else source)


def parse_config(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a tree of plain values. Raises ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors(include_url=False))
        raise ConfigError(f"{source}: {problems}.") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def told(override: str) -> tuple[str, Any]:
    """Key and value of `dotted.key=value`. Raises ConfigError where it is none, or the value is no YAML."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"-o {override} does not say which key gets which value: write it as dotted.key=value, for example -o "
            "train.loss.beta=0.2."
        )
    try:
        return key, read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"-o {override}: the value is not valid YAML ({' '.join(str(error).split())}). Write a list as [a, b], a "
            "section as {key: value}, text that has such signs in quotes, and all of it in quotes for the shell."
        ) from error
    except ValueError as error:  # what looks like a date is made one, and some are none
        raise ConfigError(f"-o {override}: no such date ({error}). Write it as in 2026-11-01.") from error


def put(tree: dict[str, Any], key: str, value: Any, *, source: str) -> None:
    """Set the value at a dotted key of a tree. Raises ConfigError where the key goes through a value."""
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"{source}: {parent} is a value, not a section, so that no key below it can be set. Check the key, or "
                f"set {parent} itself."
            )
        node = child
    node[leaf] = value


def _problem(error: Any) -> str:
    where, section = _locate(error["loc"])
    if error["type"] == "extra_forbidden":
        if error["loc"][-1] in _REFERENCE_REFRESH:
            return f"{where} is not a known key: {_REFRESH_BY_ROUNDS}"
        known = list(section.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f" (known here: {', '.join(known)})" if known else ""
        return f"{where} is not a known key{hint}"
    if error["type"] == "union_tag_invalid":
        known_types = error["ctx"]["expected_tags"].replace("'", "")
        return f"{where}.type={error['ctx']['tag']!r} is not known here (known here: {known_types})"
    if error["type"] in ("missing", "union_tag_not_found"):
        where += ".type" if error["type"] == "union_tag_not_found" else ""
        # An override does not reach into a list.
        override = "" if "[" in where else f" or pass -o {where}=…"
        return f"{where} is missing: add it to the file{override}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        # A section that may stand in several places cannot name its key in full.
        return message if not error["loc"] or where in message else f"{where}: {message}"
    return f"{where}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


_REFERENCE_REFRESH = {"sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha", "reference_refresh_steps"}
_REFRESH_BY_ROUNDS = (
    "the reference is scored once and stored, so it does not follow the policy within a run (as in TR-DPO, "
    "arXiv:2404.09656). Refresh it between rounds: run, then run again with model.path=<the published folder>, whose "
    "log-probs the reference stage then stores anew"
)


def _locate(location: tuple[Any, ...]) -> tuple[str, type[Section]]:
    """The key that a location in the tree has in the file, and the section that the key belongs to."""
    path: list[str] = []
    section: type[Section] = Config
    candidates: list[type[Section]] = []
    for part in location:
        chosen = [c for c in candidates if _tag(c) == part]
        if chosen:
            # pydantic puts the type of a loss into the location, where the file has no such key.
            section, candidates = chosen[0], []
        elif isinstance(part, int):
            path[-1] += f"[{part}]"
        elif part.startswith("~"):  # a tag, as dpo_ray.config.sources has them
            continue
        else:
            path.append(part)
            section = candidates[0] if candidates else section
            field = section.model_fields.get(part)
            candidates = _sections_in(field.annotation) if field else []
    return ".".join(path) or "the whole", section


def _tag(section: type[Section]) -> str | None:
    """The one value of a section's `type`, which chooses it among those that may stand in its place."""
    field = section.model_fields.get("type")
    return next(iter(get_args(field.annotation)), None) if field else None


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold, also in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]
