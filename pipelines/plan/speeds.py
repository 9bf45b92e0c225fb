"""How fast stages are: as earlier runs in the same output were, or as somebody states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.pool import COMPUTED
from dpo_ray.storage.artifact import Artifact, Manifest, open_artifact
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import ShardPool
from dpo_ray.training.files import KIND as TRAIN
from dpo_ray.training.steps import execution

_NEWEST = 20  # artifacts of a kind that are looked at


@dataclass(frozen=True)
class Stated:
    """What somebody says, in place of measurements."""

    tokens_per_second: float | None = None
    """Of the whole training, as its log tells them."""
    mfu: float | None = None
    """Share of `peak_tflops` that the matrix products reach."""
    peak_tflops: float | None = None
    """Of one process: of its GPU, or of its cores."""

    def __post_init__(self) -> None:
        if (self.mfu is None) != (self.peak_tflops is None):
            given = "--mfu" if self.mfu is not None else "--peak-tflops"
            raise ConfigError(
                f"{given} is given alone: a speed follows from the two together, the hardware's peak in TFLOP/s "
                "(--peak-tflops, from its data sheet, for model.dtype) and the share of it that is reached (--mfu)."
            )
        if self.mfu is not None and self.tokens_per_second is not None:
            raise ConfigError("--mfu and --tokens-per-second both say how fast training is: give one of them.")


@dataclass(frozen=True)
class Rate:
    """Rows in a second, of one worker."""

    rows_per_second: float
    source: str


@dataclass(frozen=True)
class Trained:
    """An earlier training of the same model in the same way."""

    tokens_per_second: float
    """Of one worker."""
    beside_steps: float
    """Seconds of it that were no steps: the start of workers, the model's loading, checkpoints, the export."""
    tokens: int
    seconds: float
    source: str


def measured_rate(config: Config, kind: str, matches: Callable[[Manifest], bool], gpus: float) -> Rate | None:
    """Of the newest artifact of a kind in the output whose shards were computed by such workers.

    Args:
        gpus: of a worker.
    """
    for artifact in _newest(config, kind):
        found: dict[str, Any] | None = artifact.manifest.metrics.get(COMPUTED)
        if found is None or not found["rows"] or not found["seconds"] or found["gpus"] != gpus:
            continue
        if matches(artifact.manifest):
            rate = found["rows"] / found["seconds"] / found["workers"]
            return Rate(rate, f"measured: {found['rows']} rows in {found['seconds']:g} s, {artifact.location}")
    return None


def measured_training(config: Config) -> Trained | None:
    """The newest training in the output of the same weights, dtype and adapters, by such workers."""
    train = config.train
    weights = ModelFolder.of(config.model).weights_hash()
    lora = config.model.lora.identity() if config.model.lora is not None else None
    mine = execution(train)
    for artifact in _newest(config, TRAIN):
        identity, steps = artifact.manifest.identity, artifact.manifest.metrics.get("steps")
        same = (identity["weights"], identity["dtype"], identity["lora"]) == (weights, config.model.dtype, lora)
        if steps is None or not same:
            continue
        theirs = steps["execution"]
        if {**theirs, "num_workers": None} != {**mine, "num_workers": None}:
            continue
        rate, seconds = steps["tokens_per_second"], artifact.manifest.metrics["seconds"]
        return Trained(
            rate / theirs["num_workers"],
            max(0.0, seconds - steps["tokens"] / rate),
            steps["tokens"],
            seconds,
            f"measured: {rate:.0f} tokens/s with {theirs['num_workers']} workers, {artifact.location}",
        )
    return None


def _newest(config: Config, kind: str) -> Iterator[Artifact]:
    folder = Location.of(config.run.output) / "artifacts" / kind
    for place in ShardPool(folder).present().manifests[:_NEWEST]:
        try:
            yield open_artifact(place)
        except (DataError, FileNotFoundError):  # of another schema; gc may remove it
            continue
