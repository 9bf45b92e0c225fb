"""Gate → published model: an ordinary Hugging Face folder with a card, and the pointer to the newest one."""

from __future__ import annotations

import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_ray.errors import GateFailed
from dpo_ray.evaluation.card import model_card
from dpo_ray.evaluation.gate import failed_conditions
from dpo_ray.model.folders import HASHES
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from dpo_ray.storage.published import CARD, is_complete, latest, move, published_folder, was_latest
from dpo_ray.training.files import MODEL_FOLDER
from pipelines.context import RunContext

_COPIES = 8  # at once


def publish(context: RunContext, policy: Artifact, evaluation: Artifact) -> Location:
    """Publish the policy if it passes the gate. Raises GateFailed with every reason, and publishes nothing then."""
    reasons = failed_conditions(context.config.publish.gate, evaluation.manifest.metrics)
    if reasons:
        raise GateFailed(
            f"Nothing was published, for the gate does not hold: {'; '.join(reasons)}. The trained model is in "
            f"{policy.location / MODEL_FOLDER}. Train on more or better pairs, or change publish.gate knowingly."
        )
    folder = published_folder(context.output, context.config.run.name)
    version = folder / policy.fingerprint
    if not is_complete(version):
        _copy_model(context, policy, evaluation, version)
    context.results["published"] = version.uri
    standing = latest(folder)
    if standing is not None and standing.action != "publish" and was_latest(folder, version.name):
        # A run that makes the same model again, as a nightly one without new data does, undoes nobody's decision.
        say(
            "publish",
            f"{version} was published before, and the latest stays {standing.version}: {standing.action} by "
            f"{standing.by}. `dpo-ray promote` moves it.",
        )
        return version
    data = {"policy": policy.fingerprint, **policy.manifest.inputs, "evaluation": evaluation.fingerprint}
    move(folder, version.name, action="publish", why="it passed its gate", run_id=context.run_id, data=data)
    say("publish", f"published {version}")
    return version


def _copy_model(context: RunContext, policy: Artifact, evaluation: Artifact, version: Location) -> None:
    card = model_card(context.config, context.run_id, policy.manifest.metrics, evaluation.manifest.metrics)
    if not version.is_local:
        # No folder can be renamed there: the card, whose presence makes a version complete, is written last.
        _copy_files(policy, version)
        (version / CARD).write_bytes(card.encode())
        return
    target = Path(version.uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        _copy_files(policy, Location.of(partial))
        (partial / CARD).write_text(card, encoding="utf-8")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_files(policy: Artifact, target: Location) -> None:
    """Copy the model's files, as the manifest has them; inside of an object store nothing comes by this machine."""
    below = f"{MODEL_FOLDER}/"
    names = [file.name.removeprefix(below) for file in policy.manifest.files if file.name.startswith(below)]
    model = policy.location / MODEL_FOLDER
    with ThreadPoolExecutor(_COPIES) as threads:
        list(threads.map(lambda name: (model / name).copy_to(target / name), [n for n in names if n != HASHES]))
    if HASHES in names:  # younger than what it vouches for
        (model / HASHES).copy_to(target / HASHES)
