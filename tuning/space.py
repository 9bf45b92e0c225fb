"""The grid of a sweep."""

from __future__ import annotations

from itertools import product
from typing import Any

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError


def grid(config: Config) -> list[Config]:
    """One configuration for each beta and learning rate of `tune`. Raises ConfigError where a value is no good."""
    if config.tune is None:
        raise ConfigError("There is no section tune: add tune.beta and tune.learning_rate, the lists to search.")
    return [trial_config(config, beta, rate) for beta, rate in product(config.tune.beta, config.tune.learning_rate)]


def trial_config(config: Config, beta: float, learning_rate: float) -> Config:
    """The configuration of one trial: all of it validated again with the trial's values."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["train"]["loss"]["beta"] = beta
    tree["train"]["learning_rate"] = learning_rate
    return parse_config(tree, source=f"trial with beta={beta:g}, learning_rate={learning_rate:g}")
