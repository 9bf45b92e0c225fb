"""Benchmark tasks on the cluster: several side by side, each a shard that is computed once for a model."""

from __future__ import annotations

from dpo_ray.config import Config, Model, Tasks
from dpo_ray.on_ray.pool import ShardTask, shard_stage, torch_pool
from dpo_ray.scoring.task_source import task_files_hash, tasks_folder
from dpo_ray.shards.tasks import BenchmarkTask, TaskShard, identity
from dpo_ray.storage.artifact import Artifact
from dpo_ray.storage.location import Location


def measure_tasks(output: Location, config: Config, model: Model, options: Tasks) -> tuple[Artifact, bool]:
    """What a model measures on benchmark tasks, in rows of TASK_MEASURES.

    Raises ConfigError where lm-evaluation-harness, a task or its data set is lacking.
    """
    folder = tasks_folder(options)
    files = task_files_hash(folder)
    tasks = [BenchmarkTask(name) for name in options.names]
    return shard_stage(
        output,
        "task_measures",
        identity=identity(model, options, files),
        inputs={f"tasks/{task.name}": task.content for task in tasks},
        tasks=[ShardTask(source=task, content=task.content, rows=1) for task in tasks],
        pool=torch_pool(config, TaskShard, {"model": model, "options": options, "folder": folder, "files": files}),
        unit="tasks",
    )
