"""The section `track`: which experiment trackers follow a run."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from dpo_ray.config.section import Section


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.password is not None or (parts.username is not None and parts.scheme in {"http", "https"}):
        raise ValueError(
            f"the URI below {parts.hostname} holds credentials, and a run keeps its configuration: take them out, "
            "and give them as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or leave the URI out and set "
            "MLFLOW_TRACKING_URI"
        )
    return uri


class MLflow(Section):
    """An MLflow server (the extra `mlflow`), and its model registry."""

    tracking_uri: Annotated[str, AfterValidator(_without_credentials)] | None = None
    """As in http://mlflow.example:5000; left out: what MLFLOW_TRACKING_URI says where the run is started."""
    experiment: str | None = Field(None, min_length=1)
    """The experiment that the run is in, made where there is none; left out: run.name."""
    registered_model: str | None = Field(None, min_length=1)
    """The registered model that a published one becomes a version of, with the alias champion; one that did not pass
    its gate becomes one with the alias candidate. Left out: run.name."""


class WandB(Section):
    """Weights & Biases (the extra `wandb`)."""

    project: str = Field(min_length=1)
    """The project that the run is in."""
    entity: str | None = Field(None, min_length=1)
    """The team or user that it belongs to; left out: whom WANDB_API_KEY is of."""
    mode: Literal["online", "offline"] = "online"
    """offline: everything is kept in the run's folder, or beside it, until `wandb sync` sends it."""


class Track(Section):
    """Experiment trackers, all given the same metrics while a run trains. None of them can stop it or hold it up."""

    tensorboard: bool = True
    """Event files in the run's folder, for `tensorboard --logdir OUTPUT/runs`."""
    mlflow: MLflow | None = None
    """Left out: none."""
    wandb: WandB | None = None
    """Left out: none."""

    @property
    def any(self) -> bool:
        """Whether anybody follows."""
        return self.tensorboard or self.mlflow is not None or self.wandb is not None
