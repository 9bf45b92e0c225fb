"""Gate → published model: an ordinary Hugging Face folder with a card, and the pointer to the newest one."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo_ray.config import Model
from dpo_ray.errors import GateFailed
from dpo_ray.evaluation.card import licence_of, model_card
from dpo_ray.evaluation.gate import failed_conditions
from dpo_ray.model.folders import HASHES
from dpo_ray.on_ray.metrics import GATE_MEASURE, GATE_PASSED, PUBLISHED, Work, take_up, tell
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.lease import Lease, WhenBusy, hold
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import (
    CARD,
    Move,
    compared_version,
    is_complete,
    latest,
    move,
    published_folder,
    was_latest,
)
from dpo_ray.training.files import MODEL_FOLDER
from pipelines.context import RunContext
from pipelines.push import push
from pipelines.trace import keep_lineage
from pipelines.tracking import tell_model

STAGE = "publish"
_COPIES = 8  # at once
_MEASURES = ("accuracy", "win_rate", "length_controlled_win_rate", "kl_per_token")
"""Of an evaluation, those whose metrics are told, where it has them."""


def name_lease(output: Location, name: str, run_id: str, when_busy: WhenBusy = "wait") -> AbstractContextManager[Lease]:
    """Held by who publishes under a name, or moves its pointer: what the gate compares with is then still the latest.

    Raises Busy where another run holds it and this one leaves.
    """
    return hold(
        output,
        f"models-{name}",
        f"Publishing under the name {name}",
        run_id=run_id,
        when_busy=when_busy,
        tell=lambda line: say(STAGE, line),
    )


def publish(context: RunContext, policy: Artifact, evaluation: Artifact, measure: Callable[[], Artifact]) -> Location:
    """Publish the policy if it passes the gate. Raises GateFailed with every reason, and publishes nothing then.

    Args:
        measure: the evaluation anew, where another run has published since: the gate compares with what is the latest.

    Raises Busy where another run publishes under the name and this one leaves.
    """
    name = context.config.run.name
    take_up(Work(name, STAGE))
    context.live.begins(STAGE)
    with name_lease(context.output, name, context.run_id, context.config.run.when_busy) as lease:
        compared = _compared(context, evaluation)
        standing = compared_version(published_folder(context.output, name), policy.fingerprint) if compared else None
        if standing is not None and compared != {standing}:
            say(STAGE, f"{standing} was published meanwhile: the gate is to compare with it")
            evaluation = measure()
        return _publish(context, policy, evaluation, lease)


def _compared(context: RunContext, evaluation: Artifact) -> set[str | None]:
    """The published versions that the gate compares with; None where nothing was published, empty where it does not."""
    sets = evaluation.manifest.metrics.get("sets") or {}
    return {sets.get(name, {}).get("version") for name in context.config.publish.gate.no_regression}


def _publish(context: RunContext, policy: Artifact, evaluation: Artifact, lease: Lease) -> Location:
    reasons = failed_conditions(context.config.publish.gate, evaluation.manifest.metrics)
    _tell_gate(evaluation.manifest.metrics, passed=not reasons)
    if reasons:
        tell_model(context, policy, policy.location / MODEL_FOLDER, "candidate")
        raise GateFailed(
            f"Nothing was published, for the gate does not hold: {'; '.join(reasons)}. The trained model is in "
            f"{policy.location / MODEL_FOLDER}. Train on more or better pairs, or change publish.gate knowingly."
        )
    folder = published_folder(context.output, context.config.run.name)
    version = folder / policy.fingerprint
    if not is_complete(version):
        _copy_model(context, policy, evaluation, version)
    keep_lineage(context.output, policy, run_id=context.run_id, models=context.models, sources=context.sources)
    standing = latest(folder)
    if standing is not None and standing.action != "publish" and stays(version, standing):
        say(
            STAGE,
            f"{version} was published before, and the latest stays {standing.version}: {standing.action} by "
            f"{standing.by}. `dpo-ray promote` moves it.",
        )
        context.results["published"] = version.uri
        tell_model(context, policy, version, None)
        return version
    data = {"policy": policy.fingerprint, **policy.manifest.inputs, "evaluation": evaluation.fingerprint}
    lease.require()
    made = move(folder, version.name, action="publish", why="it passed its gate", run_id=context.run_id, data=data)
    context.results["published"] = version.uri
    tell_published(made)
    tell_model(context, policy, version, "champion")
    say(STAGE, f"published {version}")
    push(context, version)
    return version


def tell_published(standing: Move) -> None:
    """The metric of the latest version; standing: the pointer."""
    tell(PUBLISHED, datetime.fromisoformat(standing.published).timestamp())


def _tell_gate(measured: dict[str, Any], *, passed: bool) -> None:
    """measured: metrics of an evaluation artifact."""
    tell(GATE_PASSED, passed)
    for name in _MEASURES:
        for bound in ("value", "low", "high"):
            if found := measured.get(name):
                tell(GATE_MEASURE, found[bound], measure=name, bound=bound)


def stays(version: Location, standing: Move) -> bool:
    """Whether publishing a version, which its run has made again, would leave the pointer where it is.

    So it does where the version is the latest, and where somebody has moved the pointer away from it: a run that makes
    the same model again undoes nobody's decision. standing: the pointer.
    """
    if not is_complete(version):
        return False
    return standing.version == version.name or (
        standing.action != "publish" and was_latest(version.parent, version.name)
    )


def _copy_model(context: RunContext, policy: Artifact, evaluation: Artifact, version: Location) -> None:
    start = context.models.get(policy.fingerprint, context.config.model)
    measured = evaluation.manifest.metrics
    card = model_card(
        context.config,
        context.run_id,
        policy.manifest.metrics,
        measured,
        started_from=start.path,
        licence=_licence(context.config.model),
        num_pairs=policy.manifest.counters.get("kept"),
    )
    if not version.is_local:
        # No folder can be renamed there: the card, whose presence makes a version complete, is written last.
        _copy_files(policy, version)
        (version / CARD).write_bytes(card.encode())
        return
    target = Path(version.uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".*.partial"):  # of a run that was killed, for the name is leased to this one
        shutil.rmtree(left, ignore_errors=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        _copy_files(policy, Location.of(partial))
        (partial / CARD).write_text(card, encoding="utf-8")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _licence(model: Model) -> str | None:
    """As the card of the model's folder names it, where that is on this machine."""
    folder = Path(model.path)
    return licence_of(folder) if folder.is_dir() else None


def _copy_files(policy: Artifact, target: Location) -> None:
    """Copy the model's files, as the manifest has them; inside of an object store nothing comes by this machine."""
    below = f"{MODEL_FOLDER}/"
    names = [file.name.removeprefix(below) for file in policy.manifest.files if file.name.startswith(below)]
    model = policy.location / MODEL_FOLDER
    with ThreadPoolExecutor(_COPIES) as threads:
        list(threads.map(lambda name: (model / name).copy_to(target / name), [n for n in names if n != HASHES]))
    if HASHES in names:  # younger than what it vouches for
        (model / HASHES).copy_to(target / HASHES)
