"""What trials are trained on: once for all that agree on it.

β, learning rate and nearly all else of a training change nothing in the rows. What does (limits in tokens, the model, a
loss without a reference) is known before the first trial, and each of its values is prepared then.
"""

from __future__ import annotations

from typing import Any

from dpo_ray.config import Config
from dpo_ray.storage.artifact import digest
from tuning.space import Given, combinations, configured, drawn, prepares


def preparations(config: Config) -> dict[str, Config]:
    """What trials are trained on: the key of some rows → a configuration that makes them, for all that differ."""
    assert config.tune is not None
    space = config.tune.searched()
    decisive = {
        path: found for path, found in space.items() if prepares(path) or path.split(".")[:2] == ["train", "loss"]
    }
    found: dict[str, Config] = {}
    for point in combinations(decisive, lambda found: (found.low,)):
        one = configured(config, drawn(decisive, Given(point)))
        found.setdefault(preparation_key(one), one)
    return found


def preparation_key(config: Config) -> str:
    """Trials for which this is equal train on the same rows."""
    loss = config.train.loss
    rows = "tokenized" if not loss.needs_reference else "mismatched" if loss.needs_mismatched else "reference"
    decisive = config.model_dump(
        mode="json", include={"model", "data", "generate", "reference"}, exclude={"model": {"lora"}}
    )
    return f"{rows}-{digest(decisive)}"


def differences(config: Config, one: Config) -> str:
    """What of the searched paths makes a preparation another one, for people."""
    assert config.tune is not None
    paths = [path for path in config.tune.searched() if prepares(path)]
    named = [f"{path}={_at(one, path)}" for path in paths]
    if "train.loss" in config.tune.searched() or "train.loss.type" in config.tune.searched():
        named.append("no reference" if not one.train.loss.needs_reference else "")
        named.append("mismatched completions" if one.train.loss.needs_mismatched else "")
    return ", ".join(filter(None, named)) or "all trials"


def _at(config: Config, path: str) -> Any:
    found: Any = config
    for part in path.split("."):
        found = getattr(found, part)
    return found
