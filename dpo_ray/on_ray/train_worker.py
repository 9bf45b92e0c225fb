"""What Ray Train runs on each worker: the loop, with Ray's feed and checkpoints put in.

Train's controller loads this module too, so what computes is imported on the workers alone.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ray.config import Metric, Model, Train
from dpo_ray.config.tolerance import Limits
from dpo_ray.errors import ConfigError, DamagedCheckpoint, DataError, DpoRayError, NonFiniteLoss
from dpo_ray.evaluation.agreement import require_same_start
from dpo_ray.on_ray.metrics import RETRIES, Work, count, keep_telling, take_up
from dpo_ray.on_ray.resume import leave_out, state_of, whole_checkpoints
from dpo_ray.progress import aside, say
from dpo_ray.storage.location import Location
from dpo_ray.storage.told import kept_told
from dpo_ray.training.files import KIND, read_history
from dpo_ray.training.index import PlanIndex
from dpo_ray.training.live import TrainingSoFar
from dpo_ray.training.longest import LongestPairs
from dpo_ray.training.selection import higher_is_better

if TYPE_CHECKING:
    from dpo_ray.training.batch import Share
    from dpo_ray.training.parallel import Rank

_WORST = 1e30


@dataclass(frozen=True)
class TrainJob:
    """What each worker is given."""

    model: Model
    options: Train
    seed: int
    num_steps: int
    pairs_per_epoch: int
    hidden_size: int
    """As in the step plan, which itself stays with the feed: it grows with the data."""
    held_out: PlanIndex | None
    """The pairs of the evaluations while training; None: there are none."""
    longest: LongestPairs
    tokens_per_microbatch: int
    reference_limits: Limits | None
    """What policy and reference may differ by at the first step; None: they are two models."""
    run: Location
    """Where Ray Train keeps this run's checkpoints."""
    export_to: Location
    """Where the trained model goes."""
    fallback: Location | None
    """The checkpoint of an earlier run to go on from, where this one has none yet."""
    sources: tuple[str, ...]
    """Of a mixture, those that metrics are told apart by."""
    whose: str | None
    """Lines of the workers are for the log alone, and named by this."""
    name: str
    """run.name, for the metrics."""
    told_to: Location | None
    """The file that says how the training stands; None: nobody reads it."""
    steps: Location
    """Where metrics are told while it trains."""


def train_worker(config: dict[str, TrainJob]) -> DpoRayError | None:
    """What Ray Train runs on each worker: the loop, with Ray's feed and checkpoints put in.

    An error that all workers meet alike is returned, not raised: Ray would only try the same again.
    """
    if config["job"].whose is not None:
        aside(config["job"].whose)
    take_up(Work(config["job"].name, KIND))
    gc.disable()  # while importing it finds nothing, and costs a fifth of the time
    import ray.train

    from dpo_ray.on_ray.preemption import Forewarning, preemption_is_watched
    from dpo_ray.on_ray.stream import TRAIN, received_steps

    shard = ray.train.get_dataset_shard(TRAIN)  # the feed's processes start while this one imports
    import ray.train.torch
    import torch

    from dpo_ray.on_ray.train_metrics import StepMetrics, ToldSteps
    from dpo_ray.training.loop import train
    from dpo_ray.training.memory import worker_memory
    from dpo_ray.training.parallel import Rank

    gc.enable()

    # Ray prints all metrics of a report on every rank, by a logger outside its own tree; they are in metrics.jsonl.
    logging.getLogger().setLevel(logging.WARNING)
    context = ray.train.get_context()
    job = config["job"]
    options = job.options
    if not options.use_gpu:
        torch.set_num_threads(max(1, int(options.cpus_per_worker)))
    me = Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    keep_telling()
    latest = ray.train.get_checkpoint()
    resume = job.run.same_store(latest.path) if latest is not None else job.fallback
    if me.rank == 0 and resume is not None:
        step = state_of(resume)["next_step"]
        say(KIND, f"going on from {resume.name}, after step {step}, with {me.world_size} workers")
        count(RETRIES, artifact=KIND)
    metrics_of = StepMetrics(me, job.num_steps, job.whose or "")
    before = _before(resume, me)
    steps = ToldSteps(job.steps, options, job.num_steps, metrics_of, before) if me.rank == 0 else None
    so_far = TrainingSoFar(job.num_steps, me.world_size, before, _gpu_memory(me))

    def told(metrics: dict[str, Any], num_tokens: int) -> None:
        (steps or metrics_of)(metrics, num_tokens)
        so_far(metrics)

    try:
        held_out = _held_out(job, me)
        told_to = job.told_to if me.rank == 0 else None
        with kept_told(told_to, so_far.content, KIND) if told_to is not None else nullcontext():
            train(
                job.model,
                options,
                seed=job.seed,
                num_steps=job.num_steps,
                pairs_per_epoch=job.pairs_per_epoch,
                me=me,
                steps_from=lambda start: received_steps(shard, me.rank, start, job.num_steps),
                held_out=held_out,
                sources=job.sources,
                checkpoints=RayCheckpoints(me, options.keep_best, job.num_steps, job.run),
                export_to=job.export_to,
                resume=resume,
                require_reference=partial(require_same_start, limits) if (limits := job.reference_limits) else None,
                longest=job.longest,
                memory=worker_memory(context.get_local_world_size(), options.gpus),
                told=told,
                is_forewarned=Forewarning(me).is_due if preemption_is_watched() else lambda: False,
            )
    except DamagedCheckpoint as error:
        damaged = Location.of(error.folder) if error.folder is not None else resume
        if me.rank == 0 and damaged is not None:
            leave_out(damaged)
        return error
    except (NonFiniteLoss, DataError, ConfigError) as error:
        return error
    finally:
        if steps is not None:
            steps.close()
    return None


def _before(resume: Location | None, me: Rank) -> list[dict[str, Any]]:
    """Metrics of the steps before, for the curves; without those of a damaged checkpoint, which `train` tells of."""
    if resume is None or me.rank != 0:
        return []
    try:
        return read_history(resume)
    except (OSError, ValueError):
        return []


def _gpu_memory(me: Rank) -> Callable[[], tuple[int, int]] | None:
    """Bytes of its GPU that this process has taken, and that there are; None: it has no GPU."""
    if me.device.type != "cuda":
        return None
    import torch

    return lambda: (torch.cuda.memory_reserved(me.device), torch.cuda.mem_get_info(me.device)[1])


def _held_out(job: TrainJob, me: Rank) -> Share | None:
    """This rank's share of the pairs that are held out. Raises DataError where they cannot be read."""
    from dpo_ray.on_ray.stream import read_share

    if job.held_out is None:
        return None
    pairs = np.arange(len(job.held_out))
    return read_share(job.held_out, pairs, me.rank, me.world_size, job.tokens_per_microbatch, job.hidden_size)


class RayCheckpoints:
    """Keeps checkpoints where Ray Train keeps them; they are uploaded while training goes on, if it need not wait."""

    def __init__(self, me: Rank, keep_best: Metric | None, num_steps: int, run: Location):
        self.me = me
        self.keep_best = keep_best
        self.num_steps = num_steps
        self.run = run

    def keep(self, metrics: dict[str, Any], folder: Path, *, wait: bool) -> None:
        import ray.train
        from ray.train import CheckpointUploadMode

        told = _numbers(metrics)
        if self.keep_best is not None:
            # Ray keeps the best ones by this; a checkpoint without evaluation is worse than any other.
            told.setdefault(self.keep_best, -_WORST if higher_is_better(self.keep_best) else _WORST)
        ray.train.report(
            told,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        if self.me.rank == 0:
            say(KIND, f"checkpoint at step {metrics['step']}/{self.num_steps}")

    def report(self, metrics: dict[str, Any]) -> None:
        import ray.train

        ray.train.report(_numbers(metrics))

    def steps(self) -> set[int]:
        self.report({})  # it comes after all others, so it waits for the uploads that are under way
        return set(self._kept())

    def of_step(self, step: int) -> Location:
        return self._kept()[step]

    def _kept(self) -> dict[int, Location]:
        return {int(state_of(checkpoint)["next_step"]): checkpoint for checkpoint in whole_checkpoints(self.run)}


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train takes of them."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
