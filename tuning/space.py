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
    if config.tune.beta is not None and not hasattr(config.train.loss, "beta"):
        raise ConfigError(
            f"tune.beta searches train.loss.beta, but train.loss.type={config.train.loss.type} has no beta: set "
            "tune.beta=null, and the sweep searches the learning rate alone."
        )
    betas = config.tune.beta or (None,)
    return [trial_config(config, beta, rate) for beta, rate in product(betas, config.tune.learning_rate)]


def trial_config(config: Config, beta: float | None, learning_rate: float) -> Config:
    """The configuration of one trial: all of it validated again with the trial's values.

    Args:
        beta: None for a loss without one.
    """
    tree: dict[str, Any] = config.model_dump(mode="json")
    if beta is not None:
        tree["train"]["loss"]["beta"] = beta
    tree["train"]["learning_rate"] = learning_rate
    return parse_config(tree, source=f"trial with beta={beta}, learning_rate={learning_rate:g}")
