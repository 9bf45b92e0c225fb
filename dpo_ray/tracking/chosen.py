"""The trackers that a configuration asks for."""

from __future__ import annotations

import os
from importlib.util import find_spec

from dpo_ray.config import Config
from dpo_ray.config.track import MLflow
from dpo_ray.errors import ConfigError
from dpo_ray.storage.location import Location
from dpo_ray.tracking.mlflow_client import URI
from dpo_ray.tracking.tracker import Tracker

_LIBRARIES = {"mlflow": "mlflow", "wandb": "wandb"}
"""Section of `track` → the module that it needs; the extra has the section's name."""


def require_trackers(config: Config) -> None:
    """Raises ConfigError where one is asked for that cannot be used: its library is missing, or where it is unsaid."""
    for section, module in _LIBRARIES.items():
        if getattr(config.track, section) is not None and find_spec(module) is None:
            raise ConfigError(
                f"track.{section} needs {module}, which is not installed: pip install 'dpo-ray[{section}]', or leave "
                f"track.{section} out."
            )
    if config.track.mlflow is not None:
        mlflow_options(config)
    wandb = config.track.wandb
    if wandb is not None and wandb.mode == "offline" and not Location.of(config.run.output).is_local:
        raise ConfigError(
            f"track.wandb.mode=offline keeps its files on the machine that starts the run, and run.output is "
            f"{config.run.output}: they would be lost with it. Set track.wandb.mode=online, or a run.output that is a "
            "folder."
        )


def mlflow_options(config: Config) -> MLflow:
    """With what run.name and the environment fill in. Raises ConfigError where no server is named."""
    options = config.track.mlflow
    assert options is not None
    uri = options.tracking_uri or os.environ.get(URI)
    if not uri:
        raise ConfigError(
            f"track.mlflow names no tracking_uri, and {URI} is not set here: give one of them, such as "
            "http://mlflow.example:5000, or leave track.mlflow out."
        )
    name = config.run.name
    return MLflow.model_construct(
        tracking_uri=uri, experiment=options.experiment or name, registered_model=options.registered_model or name
    )


def trackers_of(config: Config, folder: Location) -> list[Tracker]:
    """Args:
    folder: of the run.
    """
    found: list[Tracker] = []
    if config.track.tensorboard:
        from dpo_ray.tracking.tensorboard import TensorBoard

        found.append(TensorBoard(folder))
    if config.track.mlflow is not None:
        from dpo_ray.tracking.mlflow import MLflowTracker

        found.append(MLflowTracker(mlflow_options(config)))
    if config.track.wandb is not None:
        from dpo_ray.tracking.wandb import WandBTracker

        found.append(WandBTracker(config.track.wandb, folder, folder.name))
    return found
