"""MLflow's client, as this project has it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI = "MLFLOW_TRACKING_URI"
_NOT_NOW = (408, 429)
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # what fails is tried again anyway, and a person is to hear of it
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def client_of(uri: str) -> MlflowClient:
    """Of a tracking server, or of whatever else MLflow takes for one."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def may_pass(error: Exception) -> bool:
    """Whether the same request may go well later: the server was not there, or had no time."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())
        return status >= 500 or status in _NOT_NOW
    return isinstance(error, OSError)
