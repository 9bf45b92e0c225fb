"""Training on Ray Train: scored pairs in, a train artifact with the policy in it out."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_ray.config import Config, Metric
from dpo_ray.errors import ConfigError, DataError, DpoRayError, NonFiniteLoss, ReferenceMismatch
from dpo_ray.losses.objective import zero_margin_loss
from dpo_ray.model.folders import resolve, weights_hash
from dpo_ray.on_ray.failures import raise_ours
from dpo_ray.on_ray.session import connect
from dpo_ray.progress import say
from dpo_ray.storage.artifact import Artifact, describe_file, fingerprint, load, publish
from dpo_ray.storage.location import Location
from dpo_ray.training.checkpoint import HISTORY, STATE, is_whole, read_history
from dpo_ray.training.loop import EXPORT, train
from dpo_ray.training.memory import shape_of, tokens_that_fit
from dpo_ray.training.parallel import Rank
from dpo_ray.training.plan import PlanIndex, StepPlan, build_index
from dpo_ray.training.selection import higher_is_better

KIND = "train"
MODEL_FOLDER = "model"
_WORST = 1e30
_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's record of the checkpoints that it knows


def fit(output: Location, config: Config, pairs: Artifact) -> tuple[Artifact, bool]:
    """Train the policy on finished pairs, or take over the artifact if it is finished already.

    The artifact holds the model as a Hugging Face folder, and the metrics of every logged step. A run that was
    killed goes on from its last checkpoint.

    Args:
        pairs: what the loss needs: the reference artifact, with mismatched completions for KTO; the tokenized pairs
            for a loss without reference.
    """
    folder = resolve(config.model.path, config.model.revision)
    identity = {
        "weights": weights_hash(folder),
        "dtype": config.model.dtype,
        "lora": config.model.lora.model_dump(mode="json") if config.model.lora else None,
        "train": config.train.identity(),
        "seed": config.run.seed,
    }
    inputs = {"pairs": pairs.fingerprint}
    location = output / "artifacts" / KIND / fingerprint(KIND, identity, inputs)
    done = load(location, KIND, location.name)
    if done is not None:
        say(KIND, f"reused: {location}")
        return done, True
    plan, held_out = make_plan(config, pairs)
    say(KIND, f"{len(plan.index)} pairs, {plan.num_steps} steps of {config.train.global_batch_size} pairs")
    began = time.monotonic()
    checkpoint = _run(config, plan, held_out, location)
    history = _collect(checkpoint, location)
    exported_step = _state_of(checkpoint)["exported_step"]
    names = [f"{MODEL_FOLDER}/{name}" for name in (location / MODEL_FOLDER).names()]
    model_files = [describe_file(location / name).model_copy(update={"name": name}) for name in names]
    losses = [m["loss"] for m in history if "loss" in m]
    artifact = publish(
        location,
        KIND,
        identity=identity,
        inputs=inputs,
        files=[*model_files, describe_file(location / HISTORY)],
        counters={
            "read": plan.index.read,
            "kept": len(plan.index),
            "other_split": plan.index.read - len(plan.index) - plan.index.duplicates,
            "duplicate": plan.index.duplicates,
            "steps_left_out": sum("skipped_pairs" in m for m in history),
        },
        metrics={
            "first_step_loss": losses[0] if losses else None,
            "zero_margin_loss": zero_margin_loss(config.train.loss),
            "final": history[-1],
            "num_steps": history[-1]["step"],
            "planned_steps": plan.num_steps,
            "published_step": exported_step,
            "tokens_per_second": sum(m["tokens_per_second"] for m in history) / len(history),
            "seconds": round(time.monotonic() - began, 1),
        },
    )
    _remove_runs(location)
    return artifact, False


def make_plan(config: Config, pairs: Artifact) -> tuple[StepPlan, PlanIndex]:
    """The step plan of a configuration over its pairs, and the index of the held-out ones.

    Raises ConfigError where the plan has no step, or where held-out pairs are asked for and there are none; DataError
    where rows lack an answer that the loss needs.
    """
    model_config = json.loads((resolve(config.model.path, config.model.revision) / "config.json").read_text())
    plan = StepPlan(
        index=build_index(pairs.shards(), "train"),
        global_batch_size=config.train.global_batch_size,
        epochs=config.train.epochs,
        seed=config.run.seed,
        hidden_size=model_config.get("hidden_size") or model_config.get("n_embd") or 1024,
    )
    held_out = build_index(pairs.shards(), "eval")
    loss = config.train.loss
    if plan.index.num_unpaired and not loss.accepts_unpaired:
        raise DataError(
            f"{plan.index.num_unpaired} of the {len(plan.index)} training rows of {pairs.location} have one answer, "
            f"and train.loss.type={loss.type} compares two. Set train.loss.type=kto, or train on pairs."
        )
    steering = {config.train.keep_best, config.train.early_stopping and config.train.early_stopping.metric}
    if held_out.num_unpaired == len(held_out) and steering & {"eval_rewards/accuracies", "eval_rewards/margins"}:
        raise ConfigError(
            "train.keep_best or train.early_stopping goes by a comparison of two answers, but held-out rows have one "
            "answer each: go by eval_loss, or name pairs as data.eval."
        )
    if config.train.eval_every_steps is not None and not len(held_out):
        raise ConfigError(
            f"train.eval_every_steps is {config.train.eval_every_steps}, but there is no held-out pair: raise "
            "data.held_out_fraction, name data.eval, or leave train.eval_every_steps out."
        )
    return plan, held_out


def _run(config: Config, plan: StepPlan, held_out: PlanIndex, location: Location) -> Location:
    """Run the workers to the last step. Returns where the last checkpoint is."""
    options = config.train
    needed = options.min_workers or options.num_workers
    connect(
        needed * options.cpus_per_worker,
        needed if options.use_gpu else 0,
        wanted_cpus=options.num_workers * options.cpus_per_worker + 1,  # the stages after this one read and write too
        why="train.num_workers or min_workers, cpus_per_worker, use_gpu",
        one_process=(options.cpus_per_worker, 1 if options.use_gpu else 0),
    )
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from dpo_ray.on_ray.stream import TRAIN, StepFeed, placeholder

    tokens_per_microbatch = _tokens_per_microbatch(config)
    runs = location / "checkpoints"
    name = run_name(runs)
    filesystem, storage_path = runs.filesystem()

    def reached() -> int:
        return earliest_resume(runs / name, fallback)

    fallback = newest_whole_checkpoint(runs)
    resources = {"CPU": options.cpus_per_worker, **({"GPU": 1.0} if options.use_gpu else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "model": config.model,
            "train": options,
            "seed": config.run.seed,
            "plan": plan,
            "held_out": held_out,
            "tokens_per_microbatch": tokens_per_microbatch,
            "reference_tolerance": config.reference.tolerance,
            "fallback": fallback,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=(options.min_workers, options.num_workers) if options.min_workers else options.num_workers,
            use_gpu=options.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=options.keep_checkpoints,
                checkpoint_score_attribute=options.keep_best,
                checkpoint_score_order="max" if options.keep_best and higher_is_better(options.keep_best) else "min",
            ),
            failure_config=ray.train.FailureConfig(max_failures=options.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
        torch_config=TorchConfig(backend="nccl" if options.use_gpu else "gloo"),
        datasets={TRAIN: placeholder},
        dataset_config=StepFeed(plan, tokens_per_microbatch, reached),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raise_ours(error, KIND)
    if result.error is not None:
        raise_ours(result.error, KIND)
    if isinstance(result.return_value, DpoRayError):
        raise result.return_value
    assert result.checkpoint is not None
    return runs.same_store(result.checkpoint.path)


def _tokens_per_microbatch(config: Config) -> int:
    """As configured, or what fits into the memory of one worker."""
    options, model = config.train, config.model
    if options.tokens_per_microbatch != "auto":
        return options.tokens_per_microbatch
    import ray

    fewest = options.min_workers or options.num_workers
    memory = ray.remote(worker_memory).options(num_cpus=0, num_gpus=1 if options.use_gpu else 0).remote
    shape = shape_of(resolve(model.path, model.revision), trust_remote_code=model.trust_remote_code)
    tokens = tokens_that_fit(
        shape,
        model,
        options,
        memory=ray.get(memory(fewest, options.cpus_per_worker, options.use_gpu)),
        num_workers=fewest,
    )
    say(KIND, f"micro-batches of at most {tokens} tokens (train.tokens_per_microbatch=auto)")
    return tokens


def worker_memory(num_workers: int, cpus_per_worker: float, use_gpu: bool) -> int:
    """Bytes of one worker where this runs: its GPU's, or its part of the machine's memory.

    All of the memory, free or not, so that a run that is gone on with is cut into micro-batches as before.
    """
    if use_gpu:
        return torch.cuda.mem_get_info()[1]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    beside = max(1, min(num_workers, int((os.cpu_count() or 1) // cpus_per_worker)))
    return total // beside


def run_name(runs: Location) -> str:
    """The name under which Ray Train goes on, or begins: the first whose record of checkpoints is whole.

    Ray does not write that record atomically; a kill in the middle of it would otherwise end every later attempt.
    """
    number = 1
    while True:
        name = f"run-{number}"
        record = runs / name / _SNAPSHOT
        if not record.exists():
            return name
        try:
            json.loads(record.read_bytes())
            return name
        except ValueError:
            say(KIND, f"{record} is damaged; its checkpoints are looked at one by one")
            number += 1


def newest_whole_checkpoint(runs: Location) -> Location | None:
    """The checkpoint of the furthest step among those that were written to the end, whatever Ray's record says.

    Not the last one of a training, which could not be gone on from and whose model may be missing.
    """
    found = [c for run in runs.list() for c in _checkpoints(run) if is_whole(c) and not _state_of(c)["finished"]]
    return max(found, key=_step_of, default=None)


def earliest_resume(run: Location, fallback: Location | None) -> int:
    """A step that no checkpoint which a worker may resume from comes before; workers pass over what they have done.

    Which checkpoint Ray takes is known only on the workers. Feeding from too early costs little, from too late would
    leave steps out.

    Args:
        fallback: what workers resume from where Ray knows of no checkpoint.
    """
    start = _step_of(fallback) if fallback is not None and fallback.exists() else 0
    if not (run / _SNAPSHOT).exists():
        return start
    # A checkpoint that is half uploaded or half removed may lack its state; Ray does not resume from that one.
    return min([_step_of(c) for c in _checkpoints(run) if (c / STATE).exists()], default=start)


def _checkpoints(run: Location) -> list[Location]:
    return [child for child in run.list() if child.name.startswith("checkpoint_") and child.name != _SNAPSHOT]


def _step_of(checkpoint: Location) -> int:
    return _state_of(checkpoint)["next_step"]


def _state_of(checkpoint: Location) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_bytes())


def train_worker(job: dict[str, Any]) -> DpoRayError | None:
    """What Ray Train runs on each worker: the loop, with Ray's feed and checkpoints put in.

    An error that all workers meet alike is returned, not raised: Ray would only try the same again.
    """
    import ray.train
    import ray.train.torch

    from dpo_ray.on_ray.stream import TRAIN, read_share, received_steps

    # Ray prints all metrics of a report on every rank, by a logger outside its own tree; they are in metrics.jsonl.
    logging.getLogger().setLevel(logging.WARNING)
    context = ray.train.get_context()
    options, plan, index = job["train"], job["plan"], job["held_out"]
    if not options.use_gpu:
        torch.set_num_threads(max(1, int(options.cpus_per_worker)))
    me = Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    held_out = None
    if options.eval_every_steps is not None:
        rows = np.arange(min(options.eval_pairs, len(index)))
        held_out = read_share(index, rows, me.rank, me.world_size, job["tokens_per_microbatch"], plan.hidden_size)
    latest = ray.train.get_checkpoint()
    if latest is None and job["fallback"] is not None:
        filesystem, path = job["fallback"].filesystem()
        latest = ray.train.Checkpoint(path, filesystem)
    with latest.as_directory() if latest is not None else nullcontext() as folder:
        if me.rank == 0 and latest is not None:
            say(KIND, f"going on from {Path(latest.path).name} with {me.world_size} workers")
        try:
            train(
                job["model"],
                options,
                seed=job["seed"],
                num_steps=plan.num_steps,
                pairs_per_epoch=len(plan.index),
                me=me,
                steps_from=lambda start: received_steps(ray.train.get_dataset_shard(TRAIN), me.rank, start),
                held_out=held_out,
                checkpoints=RayCheckpoints(me, options.keep_best, plan.num_steps),
                resume=Path(folder) if folder is not None else None,
                reference_tolerance=job["reference_tolerance"],
            )
        except (NonFiniteLoss, ReferenceMismatch) as error:
            return error
    return None


class RayCheckpoints:
    """Keeps checkpoints where Ray Train keeps them; all but the last are uploaded while training goes on."""

    def __init__(self, me: Rank, keep_best: Metric | None, num_steps: int):
        self.me = me
        self.keep_best = keep_best
        self.num_steps = num_steps

    def keep(self, metrics: dict[str, Any], folder: Path, *, last: bool) -> None:
        import ray.train
        from ray.train import CheckpointUploadMode

        told = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        if self.keep_best is not None:
            # Ray keeps the best ones by this; a checkpoint without evaluation is worse than any other.
            told.setdefault(self.keep_best, -_WORST if higher_is_better(self.keep_best) else _WORST)
        ray.train.report(
            told,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if last else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        if self.me.rank == 0:
            say(KIND, f"checkpoint at step {metrics['step']}/{self.num_steps}")

    def steps(self) -> set[int]:
        return set(self._kept())

    @contextmanager
    def of_step(self, step: int) -> Iterator[Path]:
        with self._kept()[step].as_directory() as folder:
            yield Path(folder)

    def _kept(self) -> dict[int, Any]:
        import ray.train

        # It waits for the uploads that are under way.
        return {int(c.metrics["step"]): c.checkpoint for c in ray.train.get_all_reported_checkpoints()}


def _collect(checkpoint: Location, location: Location) -> list[dict[str, Any]]:
    """Copy the exported model and the metrics of the last checkpoint into the artifact."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / HISTORY).write_bytes((checkpoint / HISTORY).read_bytes())
        history = read_history(Path(scratch))
    (checkpoint / EXPORT).copy_folder_to(location / MODEL_FOLDER)
    (checkpoint / HISTORY).copy_to(location / HISTORY)
    return history


def _remove_runs(location: Location) -> None:
    """The checkpoints have served once the artifact is published."""
    runs = location / "checkpoints"
    try:
        runs.remove_folder()
    except OSError as error:
        say(KIND, f"{runs} could not be removed ({error}); nothing needs it any more")
