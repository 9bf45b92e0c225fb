"""What travels with a job: the resolved configuration, the user's own modules that it names, and what is asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import yaml

from dpo_ray.config import (
    Config,
    ImplicitReward,
    Judge,
    Model,
    Paths,
    RewardModel,
    Rule,
    SampledModel,
    Source,
    dump_config,
)
from dpo_ray.config.evaluate import Opponent
from dpo_ray.config.yaml_text import read_yaml
from dpo_ray.errors import ConfigError
from dpo_ray.storage.hub import is_hub_place

CONFIG = "config.yaml"
_LIMIT = 100 << 20  # bytes; Ray refuses more than 500 MiB, and keeps what it takes on the head
_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".git", ".venv", "*.pyc")
_OURS = ("working_dir", "py_modules")


@contextmanager
def packed(config: Config, here: Path, also: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    """A folder with all that travels, which is gone afterwards; and the names in it, beside the configuration.

    Modules of rules travel that lie in `here`, as they do when the run is started there; others are the cluster's.

    Raises ConfigError where something is not there, has a name that is taken, or is too large, and where a relative
    path of the configuration does not travel: in the job it would lie below a folder that Ray makes.
    """
    for key, path in _files(config):
        _require_reachable(key, path, here, _names(also), of_the_hub=is_hub_place(path))
    for key, path in _models(config):
        _require_reachable(key, path, here, _names(also), of_the_hub=not (here / path).exists())
    with TemporaryDirectory(prefix="dpo-ray-submit-") as made:
        folder = Path(made)
        (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
        for source in [*also, *(module for module in _own_modules(config, here) if module.name not in _names(also))]:
            _take(source, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > _LIMIT:
            raise ConfigError(
                f"What is to travel with the job takes {size >> 20} MiB, of {_LIMIT >> 20} at most. Ship modules only, "
                "and put data and models where the cluster's nodes reach them."
            )
        yield folder, sorted(path.name for path in folder.iterdir() if path.name != CONFIG)


def _files(config: Config) -> Iterator[tuple[str, str]]:
    """Option and path, of all that the job reads but models."""
    data, tasks = config.data, config.evaluate.tasks
    named: list[tuple[str, Paths | None]] = [("data.train", source.path) for source in data.sources]
    if not data.sources:
        named.append(("data.train", cast("Paths | None", data.train)))
    named.append(("data.eval", data.eval))
    named += [(f"evaluate.sets.{name}", paths) for name, paths in config.evaluate.sets.items()]
    named.append(("generate.prompts", config.generate.prompts if config.generate is not None else None))
    named.append(("evaluate.tasks.include_path", tasks.include_path if tasks is not None else None))
    named += [(f"{key}.chat_template", model.chat_template) for key, model in _templated(config)]
    named += [(f"{key}.template", source.template) for key, source in _sources(config) if isinstance(source, Judge)]
    for key, paths in named:
        yield from ((key, path) for path in ([paths] if isinstance(paths, str) else paths or ()))


def _models(config: Config) -> Iterator[tuple[str, str]]:
    """Option and path, of all models that the job loads."""
    named = [(f"{key}.path", model.path) for key, model in _templated(config)]
    for key, source in _sources(config):
        match source:
            case RewardModel():
                named.append((f"{key}.path", source.path))
            case ImplicitReward():
                named += [(f"{key}.policy", source.policy), (f"{key}.reference", source.reference)]
            case Judge():
                named.append((f"{key}.model", source.model))
    yield from ((key, path) for key, path in named if path is not None)


def _templated(config: Config) -> list[tuple[str, Model | Opponent | SampledModel]]:
    """Section and what it says, of the models that text is put before by a chat template."""
    found: list[tuple[str, Model | Opponent | SampledModel]] = [("model", config.model)]
    if config.evaluate.win_rate is not None and config.evaluate.win_rate.against is not None:
        found.append(("evaluate.win_rate.against", config.evaluate.win_rate.against))
    if config.generate is not None:
        found += [("generate.models", model) for model in config.generate.models]
    return found


def _sources(config: Config) -> list[tuple[str, Source]]:
    """Option and source, of all scores."""
    rewards = [("generate.reward", config.generate.reward)] if config.generate is not None else []
    if config.evaluate.win_rate is not None:
        rewards.append(("evaluate.win_rate.reward", config.evaluate.win_rate.reward))
    return [(key, source) for key, reward in rewards for source in reward]


def _require_reachable(key: str, path: str, here: Path, shipped: Collection[str], *, of_the_hub: bool) -> None:
    first = next(iter(Path(path).parts), path)
    if of_the_hub or "://" in path or path.startswith(("/", "~")) or first in shipped:
        return
    travels = "" if first == ".." else f"; or, where it is small, have it travel along: --ship {first}"
    raise ConfigError(
        f"{key} is {path}, a relative path, which a job on a cluster looks for below Ray's temporary working "
        f"directory. Name a bucket, as in s3://bucket/folder, or an absolute path that all nodes see{travels}."
    )


def runtime_env(folder: Path, names: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Ray's runtime environment of the job.

    Args:
        names: environment variables of this process that the job is to have.
        file: YAML with further fields of it, as pip, uv, image_uri or env_vars.

    Raises ConfigError where a variable is not set here, or the file is none of these.
    """
    given = _read(file) if file is not None else {}
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(
            f"--env {missing[0]}: this variable is not set here, so that the job cannot be given it. Set it, or leave "
            "--env out."
        )
    variables = {**(given.get("env_vars") or {}), **{name: os.environ[name] for name in names}}
    return {**given, **({"env_vars": variables} if variables else {}), "working_dir": str(folder)}


def _read(file: Path) -> dict[str, Any]:
    try:
        given = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--runtime-env {file} cannot be read ({' '.join(str(error).split())}). Name a YAML file with fields of a "
            "Ray runtime environment, or leave --runtime-env out."
        ) from error
    if not isinstance(given, dict):
        raise ConfigError(
            f"--runtime-env {file} is to hold fields by name, and holds {type(given).__name__}. Write fields of a Ray "
            "runtime environment into it, as in `pip: [textstat]`."
        )
    if taken := [name for name in _OURS if name in given]:
        raise ConfigError(
            f"--runtime-env {file} has {taken[0]}, which is made of the configuration and what is shipped: take it "
            "out, and name files and folders by --ship."
        )
    from ray.runtime_env import RuntimeEnv

    if unknown := sorted(given.keys() - RuntimeEnv.known_fields):
        fields = ", ".join(sorted(name for name in RuntimeEnv.known_fields if name[0] != "_" and name not in _OURS))
        raise ConfigError(
            f"--runtime-env {file} has {unknown[0]}, which Ray's runtime environments lack. Take it out, or name one "
            f"of {fields}."
        )
    try:
        RuntimeEnv(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--runtime-env {file} is no runtime environment of Ray ({error}). Mend that field, as Ray's documentation "
            "of RuntimeEnv has it."
        ) from error
    return given


def _names(paths: Sequence[Path]) -> set[str]:
    return {path.absolute().name for path in paths}


def _own_modules(config: Config, here: Path) -> list[Path]:
    """Files and packages in a folder that are the modules of the configuration's rules."""
    rules = [source for _, source in _sources(config) if isinstance(source, Rule)]
    tops = {rule.function.partition(":")[0].partition(".")[0] for rule in rules}
    found = (path for top in sorted(tops) for path in (here / f"{top}.py", here / top) if path.exists())
    # The installed one is the cluster's.
    return [path for path in found if path.name != "dpo_ray"]


def _take(source: Path, folder: Path) -> None:
    source = source.absolute()
    target = folder / source.name
    if target.exists():
        raise ConfigError(f"--ship {source}: something else that travels is called {source.name}. Rename one of them.")
    if source.is_dir():
        shutil.copytree(source, target, ignore=_LEFT_OUT)
    elif source.is_file():
        shutil.copy2(source, target)
    else:
        raise ConfigError(
            f"--ship {source}: there is no such file or folder. Check the path; a relative one begins in the folder "
            "where the command is given."
        )
