"""What training leaves in folders: the files of a checkpoint, and of the finished artifact. It needs no torch."""

from __future__ import annotations

import json
from typing import Any

from dpo_ray.storage.artifact import FileEntry
from dpo_ray.storage.location import Location

STATE = "state.json"
HISTORY = "metrics.jsonl"
SKIPPED = "skipped_pairs"
"""In a line of the history: the ids of the step's pairs, where it was skipped."""


def read_history(checkpoint: Location) -> list[dict[str, Any]]:
    """The metrics of every logged step up to the checkpoint."""
    return [json.loads(line) for line in (checkpoint / HISTORY).read_bytes().splitlines()]


def num_skipped(history: list[dict[str, Any]]) -> int:
    """Logged steps that changed nothing, for their loss or their gradient was not finite."""
    return sum(SKIPPED in metrics for metrics in history)


def is_whole(checkpoint: Location) -> bool:
    """Whether every file of a checkpoint is there in its full size; an upload may have been cut short."""
    try:
        files = json.loads((checkpoint / STATE).read_bytes())["files"]
        return all((checkpoint / name).size() == size for name, size in files.items())
    except (FileNotFoundError, ValueError):
        return False


EXPORTED = "exported.json"
"""In the last checkpoint: the entries of the trained model's files, which lie in the artifact already."""


def exported_files(checkpoint: Location) -> list[FileEntry]:
    """The files of the trained model, by their names in its folder."""
    return [FileEntry(**entry) for entry in json.loads((checkpoint / EXPORTED).read_bytes())]


KIND = "train"
MODEL_FOLDER = "model"
