"""What of a run its output folder holds already: asked of the stages themselves, which compute nothing here."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field

from dpo_ray.config import Config
from dpo_ray.data.raw.files import Stamp
from dpo_ray.data.raw.scan import map_files, read_record
from dpo_ray.on_ray.resume import newest_whole_checkpoint, state_of
from dpo_ray.on_ray.trainer import train_location
from dpo_ray.storage.artifact import Artifact, Unfinished, load
from dpo_ray.storage.finished import only_finished
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import ShardPool
from dpo_ray.training.files import KIND as TRAIN
from pipelines.context import RunContext
from pipelines.deduplicate import deduplicate
from pipelines.evaluate import evaluate
from pipelines.generate import generate
from pipelines.ingest import FILES, ingest, sides
from pipelines.reference import reference
from pipelines.tokenize import tokenize


@dataclass
class Reached:
    """How far earlier runs have come with this configuration."""

    finished: dict[str, Artifact] = field(default_factory=dict)
    """Stage, or a part of one → what it has made."""
    at: str | None = None
    """The first that is not finished; None: all are."""
    shards: tuple[int, int] | None = None
    """Of `at`: how many are there, and of how many; None where it has none, or they are not known yet."""
    step: int | None = None
    """Where `at` is a training with checkpoints: the step that it goes on from."""


@dataclass
class _Looking(RunContext):
    """A run that takes over what is finished, and writes nothing."""

    reached: Reached = field(default_factory=Reached)
    within: str | None = None
    """The stage that the present ones are parts of."""

    def stage(self, name: str, make: Callable[[], tuple[Artifact, bool]]) -> Artifact:
        self.reached.at = self.within or name
        artifact, _ = make()
        if self.within is None:
            self.reached.finished[name] = artifact
        self.stages[name] = {"fingerprint": artifact.fingerprint}
        return artifact

    def whole(self, name: str, work: Callable[[], Artifact]) -> Artifact:
        """A stage of several parts."""
        self.within = self.reached.at = name
        artifact = self.reached.finished[name] = work()
        self.within = None
        return artifact


def reached(config: Config) -> Reached:
    """Raises ConfigError and DataError as the stages do, where what is finished already stands in a run's way."""
    context = _Looking(config, "plan", Location.of(config.run.output))
    try:
        # What stages say of what they take over is for who runs them.
        with only_finished(claims=False), redirect_stderr(io.StringIO()):
            _walk(context)
        context.reached.at = None
    except Unfinished as end:
        if end.tasks and context.within is None:
            present = ShardPool(end.location.parent).present().by_task
            context.reached.shards = sum(task in present for task in end.tasks), len(end.tasks)
        if end.kind == TRAIN and (checkpoint := newest_whole_checkpoint(end.location / "checkpoints")) is not None:
            context.reached.step = state_of(checkpoint)["next_step"]
    return context.reached


def _walk(context: _Looking) -> None:
    if context.config.generate is not None:
        pairs = context.whole("generate", lambda: generate(context))
    else:
        context.reached.at = "ingest"
        _require_scanned(context)
        pairs = ingest(context)
    left_out = deduplicate(context, pairs)
    tokenized = tokenize(context, pairs, left_out)
    rows, calibration = reference(context, tokenized)
    policy = context.stage(TRAIN, lambda: _policy(context, rows))
    context.whole("evaluate", lambda: evaluate(context, pairs, rows, calibration, policy))


def _require_scanned(context: _Looking) -> None:
    """Raises Unfinished where a file has not been looked through since it was written."""
    folder, data = context.output / FILES, context.config.data
    for side in sides(context.config):
        stamps = map_files(Stamp.of, side.files)
        if not all(map_files(lambda stamp: read_record(folder, stamp, data.rows_per_shard), stamps)):
            raise Unfinished(folder, "files", ())


def _policy(context: _Looking, rows: Artifact) -> tuple[Artifact, bool]:
    location = train_location(context.output, context.config, rows)
    artifact = load(location, TRAIN, location.name)
    if artifact is None:
        raise Unfinished(location, TRAIN, ())
    return artifact, True
