"""What a run's trackers are told, and when: its options, its steps while it trains, what was measured, its pages."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_ray.config import dump_config
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from dpo_ray.tracking.chosen import mlflow_options, trackers_of
from dpo_ray.tracking.fan import Fan, flat
from dpo_ray.tracking.follower import Follower
from dpo_ray.tracking.record import Record
from dpo_ray.tracking.registry import note_followed
from dpo_ray.tracking.tracker import Alias, Model, Opening, Point, State, point_of
from dpo_ray.training.files import read_history
from pipelines.live import at_work

if TYPE_CHECKING:
    from pipelines.context import RunContext

STAGE = "track"
_KEPT = ("config.yaml", "summary.json", "report.html")
_BOUNDS = ("value", "low", "high")


def begin_tracking(context: RunContext, plan: list[str]) -> None:
    """Open the run's trackers, where it comes to a training and any are asked for.

    Args:
        plan: its stages.
    """
    config = context.config
    if not config.track.any or not {"train", "sweep"} & set(plan):
        return
    try:
        record = Record.of(context.output, context.folder, dump_config(config), at_work)
    except OSError as error:
        say(STAGE, f"whether an earlier run is gone on with cannot be found out, so its trackers begin anew ({error})")
        record = Record(context.folder)
    fan = Fan(trackers_of(config, context.folder), record, lambda line: say(STAGE, line))
    fan.open(Opening("", context.run_id, flat(config.model_dump(mode="json"))))
    context.trackers = fan


def end_tracking(context: RunContext, state: State) -> None:
    """Give the trackers the run's pages, and close them."""
    if context.trackers is None:
        return
    try:
        with tempfile.TemporaryDirectory(prefix="dpo-ray-tracked-") as scratch:
            kept = []
            for name in _KEPT:
                file = context.folder / name
                if file.exists():
                    file.copy_to(Location(f"{scratch}/{name}"))
                    kept.append(Path(scratch, name))
            context.trackers.keep(kept)
            context.trackers.close(state)
    except OSError as error:  # the run has ended as it has
        say(STAGE, f"the run's pages could not be given to its trackers ({error}); they are in {context.folder}")
        context.trackers.close(state)


@contextmanager
def followed(fan: Fan | None, whose: str, training: Location) -> Iterator[None]:
    """Within it the run's trackers are given the steps of a training as they are made.

    Args:
        whose: the run's, or a part of it, such as a round.
        training: where its artifact lies, finished or not.
    """
    if fan is None:
        yield
        return
    follower = Follower(fan)
    follower.follow(whose, training)
    try:
        yield
    finally:
        follower.leave(whose)
        follower.close()


def tell_history(fan: Fan | None, whose: str, policy: Artifact) -> None:
    """All steps of a finished training: of one that was taken over, or whose last ones nobody brought."""
    if fan is not None:
        fan.points(whose, [point_of(line) for line in read_history(policy.location)])


def tell_evaluation(context: RunContext, policy: Artifact, measured: Mapping[str, Any]) -> None:
    """What was measured of the trained policy, at its last step, with the bounds of the intervals.

    Args:
        measured: metrics of an evaluation artifact.
    """
    if context.trackers is None:
        return
    values = {
        f"evaluation/{name}" + (f"_{bound}" if bound != "value" else ""): float(found[bound])
        for name, found in measured.items()
        if isinstance(found, Mapping) and set(_BOUNDS) <= found.keys()
        for bound in _BOUNDS
    }
    tasks = measured.get("tasks") or ()
    values |= {
        f"evaluation/tasks/{_named(task['task'])}/{_named(task['metric'])}": float(task["tuned"]["value"])
        for task in tasks
        if task["tuned"]["value"] is not None
    }
    point = point_of({"step": policy.manifest.metrics["num_steps"]})
    context.trackers.conclude("", Point(point.step, point.when, values))


def _named(text: str) -> str:
    """A part of a metric's name as all trackers take it: MLflow refuses commas, which filtered metrics have."""
    return re.sub(r"[^\w. -]", "_", text)


def tell_model(context: RunContext, policy: Artifact, model: Location, alias: Alias | None) -> None:
    """Have the registries know a model.

    Args:
        model: its folder.
    """
    if context.trackers is None:
        return
    config = context.config
    context.trackers.register(Model(model.uri, policy.fingerprint, alias, {"run_id": context.run_id}))
    if config.track.mlflow is not None:
        options = mlflow_options(config)
        assert options.tracking_uri is not None and options.registered_model is not None
        folder = context.output / "models" / config.run.name
        try:
            note_followed(folder, options.tracking_uri, options.registered_model)
        except OSError as error:
            say(STAGE, f"which registered model follows {folder} could not be kept ({error}): later moves miss it")
