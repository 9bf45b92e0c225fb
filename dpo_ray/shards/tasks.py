"""A benchmark task → what a model measures on it, a task a shard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_ray.config import Model, Tasks
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.pairs import TASK_MEASURES
from dpo_ray.scoring.task_source import require_harness, require_same_files
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.artifact import digest, library_versions

VERSION = 1
"""Of how the model is asked and of what is kept of the answer; another one makes all tasks be measured again."""


def identity(model: Model, options: Tasks, files: str | None) -> dict[str, Any]:
    """What changes a model's figures, beside the task: no matter where the model or the task files lie.

    files: hash of one's own task files.
    """
    folder, versions = ModelFolder.of(model), library_versions()
    return {
        "version": VERSION,
        "weights": folder.weights_hash(),
        "tokenizer": folder.tokenizer_hash(),
        "dtype": model.dtype,
        "task_files": files,
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "engine_version": f"lm_eval {require_harness()}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}",
    }


@dataclass(frozen=True)
class BenchmarkTask:
    """A task, a tag or a group of lm-evaluation-harness."""

    name: str

    @property
    def content(self) -> str:
        """Digest of the name: what stands behind it is told by the versions and files of the identity."""
        return digest(self.name)


class TaskShard:
    """A benchmark task → TASK_MEASURES of one model.

    Args:
        folder, files: of one's own task files, and what the driver knows them by.

    Raises ConfigError where the files are others here.
    """

    def __init__(self, model: Model, options: Tasks, folder: Path | None, files: str | None):
        # Not above: who only names this class does without torch.
        from dpo_ray.scoring.harness import Harness

        require_same_files(folder, files)
        self._harness = Harness(model, options, folder)

    def __call__(self, source: BenchmarkTask) -> ShardOutput:
        table = pa.Table.from_pylist(self._harness.measure(source.name), schema=TASK_MEASURES)
        return ShardOutput(table, Counter(read=table.num_rows))
