"""MLflow's model registry: what passed its gate is a version with the alias champion, what did not a candidate.

A version's source is the model's own URI. A folder of this machine's is named with the machine, dpo-ray://node/folder:
a server takes no path that it would look for on its own disk, nor a scheme by which it would ask another machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dpo_ray.progress import node
from dpo_ray.storage.location import Location
from dpo_ray.tracking.credentials import without_credentials
from dpo_ray.tracking.mlflow_client import URI
from dpo_ray.tracking.tracker import Model

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
VERSION = "dpo_ray.version"
"""Tag of a version: the fingerprint of its model."""
_URI = "dpo_ray.uri"
_FOLLOWED = "mlflow.json"
"""Beside the pointer of a name: which registered model its moves are told to."""


class Registry:
    """One registered model."""

    def __init__(self, client: MlflowClient, name: str) -> None:
        self._client, self._name = client, name

    def register(self, model: Model, run_id: str) -> None:
        """Make it a version, where it is none yet, and give it its alias."""
        version = self._version_of(model.version, source_of(model.uri))
        if version is None:
            self._make_registered_model()
            tags = {VERSION: model.version, _URI: model.uri, **model.tags}
            made = self._client.create_model_version(
                self._name, source_of(model.uri), run_id, tags=tags, await_creation_for=0
            )
            version = str(made.version)
        if model.alias is not None:
            self._client.set_registered_model_alias(self._name, model.alias, version)

    def follow(self, fingerprint: str) -> bool:
        """Move the alias champion to a model. Returns False where it is no version here."""
        version = self._version_of(fingerprint)
        if version is None:
            return False
        self._client.set_registered_model_alias(self._name, CHAMPION, version)
        return True

    def _version_of(self, fingerprint: str, source: str | None = None) -> str | None:
        """The newest one: a model that was refused first and let through later is two, from two folders."""
        found = self._client.search_model_versions(
            f"name = '{self._name}' AND tags.`{VERSION}` = '{fingerprint}'", max_results=100
        )
        return max((str(one.version) for one in found if source in {None, one.source}), key=int, default=None)

    def _make_registered_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def source_of(uri: str) -> str:
    """As a registry is told where a model lies."""
    return uri if "://" in uri else f"dpo-ray://{node()}{quote(uri)}"


def note_followed(folder: Location, tracking_uri: str, registered_model: str) -> None:
    """Keep which registered model follows the pointer of a name.

    Args:
        folder: of the name, as of dpo_ray.storage.published.
    """
    told = {"tracking_uri": without_credentials(tracking_uri), "registered_model": registered_model}
    (folder / _FOLLOWED).write_bytes(json.dumps(told, indent=1).encode())


def follow_move(folder: Location, version: str, tell: Callable[[str], None]) -> None:
    """Have the alias champion follow the pointer, where a registry does; what goes wrong is told.

    Args:
        folder: as of note_followed.
        version: the one that the pointer names now.
    """
    uri, name = "the server", "the registered model"
    given = os.environ.get(URI, "")
    try:
        followed: dict[str, Any] = json.loads((folder / _FOLLOWED).read_bytes())
        uri, name = followed["tracking_uri"], followed["registered_model"]
        from dpo_ray.tracking.mlflow_client import client_of

        if Registry(client_of(given if without_credentials(given) == uri else uri), name).follow(version):
            tell(f"MLflow: {CHAMPION} of {name} is {version} now")
            return
        reason = f"{version} is no version of it there"
    except FileNotFoundError:
        return
    except Exception as error:  # the pointer was moved, whatever becomes of this
        reason = f"{type(error).__name__}: {without_credentials(' '.join(str(error).split()))[:300]}"
    tell(
        f"MLflow: {CHAMPION} of {name} was not moved ({reason}). The pointer was: see that {uri} answers, and say "
        f"`dpo-ray promote` with {version}, which moves both."
    )
