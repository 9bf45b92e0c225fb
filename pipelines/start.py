"""What a training starts from: the model itself, or what was published last (train.start).

The reference is `model` either way, so that its scores serve every night, and beta holds the policy near the same model
however many nights it goes on. A policy that starts elsewhere than its reference has no zero margin at its first step:
that check is for trainings that start from the reference. The calibration of the reference does not depend on it.
"""

from __future__ import annotations

from dpo_ray.config import Config, Model
from dpo_ray.errors import ConfigError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.storage.lineage import PolicyLineage, read_policy
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import is_complete, latest, published_folder


def starting_model(config: Config, output: Location) -> Model:
    """The model whose weights training starts with. Raises ConfigError where the published one cannot be it."""
    folder = published_folder(output, config.run.name)
    standing = latest(folder) if config.train.start == "published" else None
    if standing is None:
        return config.model
    if not is_complete(folder / standing.version):
        raise ConfigError(
            f"train.start=published, and {folder / standing.version}, which is the latest, is not there as a whole. "
            "Name another one with `dpo-ray promote`, or set train.start=base."
        )
    _require_same_base(config, output, standing.version)
    return _at(config, folder / standing.version)


def start_of_published(config: Config, output: Location) -> Model | None:
    """The model that the published one itself was trained from, by today's configuration; None where it has gone."""
    folder = published_folder(output, config.run.name)
    standing = latest(folder)
    record = read_policy(output, standing.version) if standing is not None else None
    if record is None or record.parent is None:
        return config.model
    before = folder / record.parent
    return _at(config, before) if is_complete(before) else None


def _at(config: Config, folder: Location) -> Model:
    return config.model.model_copy(update={"path": folder.uri, "revision": None})


def _require_same_base(config: Config, output: Location, version: str) -> None:
    """Raises ConfigError where the published model descends from another one than the reference."""
    first = _first_of(output, version)
    if first is None:  # published by an earlier dpo-ray
        return
    mine = ModelFolder.of(config.model).weights_hash()
    if first.model.weights != mine:
        raise ConfigError(
            f"train.start=published, and {config.run.name}/{version} descends from {first.model.path} (weights "
            f"{first.model.weights}), while model.path={config.model.path} ({mine}) is what the reference is scored "
            "with. Set train.start=base for this run, or publish under another run.name."
        )


def _first_of(output: Location, version: str) -> PolicyLineage | None:
    """The policy that a version descends from and that was itself trained from a model of others."""
    record = read_policy(output, version)
    while record is not None and record.parent is not None:
        record = read_policy(output, record.parent)
    return record
