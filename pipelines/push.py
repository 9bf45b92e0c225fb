"""A published model's folder to the Hugging Face Hub. It is published whether or not this succeeds.

<output>/models/<name>/pushed.json says which version lies at each place of the hub, and as which commit: the same
command pushes what is not there, and nothing twice.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_ray.config import Config, PushToHub
from dpo_ray.errors import ConfigError
from dpo_ray.model.folders import HASHES
from dpo_ray.progress import say
from dpo_ray.storage.location import Location
from pipelines.context import RunContext

STAGE = "push"
PUSHED = "pushed.json"
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]
"""Those of the model before, of which some may have other names, are removed from the repository. Where an adapter's
configuration stays beside a whole model, transformers loads the adapter's base."""


def require_push(config: Config) -> None:
    """Raises ConfigError where nobody says who is to push: before the run, and not after its hours."""
    from huggingface_hub import get_token

    if (options := config.publish.push_to_hub) is not None and get_token() is None:
        raise ConfigError(
            f"publish.push_to_hub names {options.repo_id}, and there is no token of the hub here: set HF_TOKEN where "
            "the run is started (a job takes it in its runtime_env), run `hf auth login`, or leave publish.push_to_hub "
            "out."
        )


def push(context: RunContext, version: Location) -> None:
    """Push a published version, where the configuration asks for it and it is not there yet.

    Args:
        version: its folder, below that of its name.
    """
    options = context.config.publish.push_to_hub
    if options is None:
        return
    record = version.parent / PUSHED
    try:
        pushed: dict[str, Any] = json.loads(record.read_bytes()) if record.exists() else {}
        found = pushed.get(options.place)
        is_there = found is not None and found["version"] == version.name
        if found is None or not is_there:
            commit = _upload(options, version, f"{context.config.run.name}/{version.name} of run {context.run_id}")
            found = {"version": version.name, "commit": commit}
            record.write_bytes(json.dumps({**pushed, options.place: found}, indent=1).encode())
    except Exception as error:  # whatever the hub, its library or the store does: the model is published
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        context.results["pushed"] = {"to": options.place, "version": version.name, "commit": None, "reason": reason}
        say(
            STAGE,
            f"{version} is published, but could not be pushed to {options.place} ({reason}). See to that, and say the "
            f"same again, which pushes it and computes nothing: {context.command_line()}",
        )
        return
    context.results["pushed"] = {"to": options.place, **found}
    where = f"{options.place} already" if is_there else options.place
    say(STAGE, f"{version.name} is at {where}, as commit {found['commit']}")


def _upload(options: PushToHub, version: Location, message: str) -> str:
    """The commit. What is there already makes none that is new."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(options.repo_id, private=options.private, exist_ok=True)
    if options.revision is not None:
        hub.create_branch(options.repo_id, branch=options.revision, exist_ok=True)
    with _on_this_machine(version) as folder:
        made = hub.upload_folder(
            repo_id=options.repo_id,
            folder_path=folder,
            revision=options.revision,
            commit_message=message,
            ignore_patterns=[HASHES],
            delete_patterns=_WEIGHTS,
        )
    return str(made.oid)


@contextmanager
def _on_this_machine(version: Location) -> Iterator[Path]:
    if version.is_local:
        yield Path(version.uri)
        return
    with tempfile.TemporaryDirectory(prefix="dpo-ray-push-") as scratch:
        version.copy_folder_to(Location(scratch))
        yield Path(scratch)
