"""Gate → published model: an ordinary Hugging Face folder with a card, and the pointer to the newest one."""

from __future__ import annotations

import json
import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpo_ray.config import Gate
from dpo_ray.errors import GateFailed
from dpo_ray.evaluation.card import model_card
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location
from dpo_ray.training.files import MODEL_FOLDER
from pipelines.context import RunContext

LATEST = "latest.json"


def publish(context: RunContext, policy: Artifact, evaluation: Artifact) -> Location:
    """Publish the policy if it passes the gate. Raises GateFailed with every reason, and publishes nothing then."""
    reasons = gate_reasons(context.config.publish.gate, evaluation.manifest.metrics)
    if reasons:
        raise GateFailed(
            f"Nothing was published, for the gate does not hold: {'; '.join(reasons)}. The trained model is in "
            f"{policy.location / MODEL_FOLDER}. Train on more or better pairs, or change publish.gate knowingly."
        )
    folder = context.output / "models" / context.config.run.name
    version = folder / policy.fingerprint
    if not (version / "README.md").exists():
        _copy_model(context, policy, evaluation, version)
    pointer = {
        "version": version.name,
        "path": version.uri,
        "run_id": context.run_id,
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / LATEST).write_bytes(json.dumps(pointer, indent=1).encode())
    context.results["published"] = version.uri
    say("publish", f"published {version}")
    return version


def gate_reasons(gate: Gate, metrics: dict[str, Any]) -> list[str]:
    """Why the metrics of an evaluation do not pass the gate; empty where they pass."""
    reasons = []
    for name, limit in (("accuracy", gate.accuracy_above), ("win_rate", gate.win_rate_above)):
        if limit is None:
            continue
        found = metrics.get(name)
        if found is None:
            reasons.append(f"{name} is undefined, and publish.gate.{name}_above={limit:g} asks for it")
        elif not found["low"] > limit:
            reasons.append(
                f"{name} is {found['value']:.3f} with a 95% interval from {found['low']:.3f}, which does not lie above "
                f"publish.gate.{name}_above={limit:g} (n={found['n']})"
            )
    return reasons


def _copy_model(context: RunContext, policy: Artifact, evaluation: Artifact, version: Location) -> None:
    card = model_card(context.config, context.run_id, policy.manifest.metrics, evaluation.manifest.metrics)
    model = policy.location / MODEL_FOLDER
    if not version.is_local:
        # No folder can be renamed there: the card, whose presence makes a version complete, is written last.
        model.copy_folder_to(version)
        (version / "README.md").write_bytes(card.encode())
        return
    target = Path(version.uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        model.copy_folder_to(Location.of(partial))
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
