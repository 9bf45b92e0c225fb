"""Training on Ray Train: a reference artifact in, a train artifact with the policy in it out."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from dpo_ray.artifacts import Artifact, describe_file, fingerprint, load, publish
from dpo_ray.checkpoint import read_history
from dpo_ray.config import Config
from dpo_ray.losses import zero_margin_loss
from dpo_ray.model import resolve, weights_hash
from dpo_ray.on_ray.session import connect, raise_ours
from dpo_ray.plan import StepPlan, build_index
from dpo_ray.progress import say
from dpo_ray.storage import Location
from dpo_ray.train_loop import EXPORT, Rank, train

KIND = "train"
MODEL_FOLDER = "model"
HISTORY = "metrics.jsonl"
_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's record of the checkpoints that it knows


def fit(output: Location, config: Config, reference: Artifact) -> tuple[Artifact, bool]:
    """Train the policy on a finished reference artifact, or take over the artifact if it is finished already.

    The artifact holds the model as a Hugging Face folder, and the metrics of every logged step. A run that was
    killed goes on from its last checkpoint.
    """
    folder = resolve(config.model.path, config.model.revision)
    identity = {
        "weights": weights_hash(folder),
        "dtype": config.model.dtype,
        "train": config.train.identity(),
        "seed": config.run.seed,
    }
    inputs = {"reference": reference.fingerprint}
    location = output / "artifacts" / KIND / fingerprint(KIND, identity, inputs)
    done = load(location, KIND, location.name)
    if done is not None:
        say(KIND, f"reused: {location}")
        return done, True
    plan = make_plan(config, reference)
    say(KIND, f"{len(plan.index)} pairs, {plan.num_steps} steps of {config.train.global_batch_size} pairs")
    began = time.monotonic()
    checkpoint = _run(config, plan, location)
    history = _collect(checkpoint, location)
    model_files = [
        describe_file(f).model_copy(update={"name": f"{MODEL_FOLDER}/{f.name}"})
        for f in (location / MODEL_FOLDER).list()
    ]
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
        },
        metrics={
            "first_step_loss": history[0]["loss"],
            "zero_margin_loss": zero_margin_loss(config.train.loss),
            "final": history[-1],
            "num_steps": plan.num_steps,
            "tokens_per_second": sum(m["tokens_per_second"] for m in history) / len(history),
            "seconds": round(time.monotonic() - began, 1),
        },
    )
    _remove_runs(location)
    return artifact, False


def make_plan(config: Config, reference: Artifact) -> StepPlan:
    """The step plan of a configuration over a reference artifact. Raises ConfigError where it has no step."""
    model_config = json.loads((resolve(config.model.path, config.model.revision) / "config.json").read_text())
    return StepPlan(
        index=build_index(reference.shards(), "train"),
        global_batch_size=config.train.global_batch_size,
        epochs=config.train.epochs,
        seed=config.run.seed,
        hidden_size=model_config.get("hidden_size") or model_config.get("n_embd") or 1024,
    )


def _run(config: Config, plan: StepPlan, location: Location) -> Location:
    """Run the workers to the last step. Returns where the last checkpoint is."""
    options = config.train
    connect(
        options.num_workers * options.cpus_per_worker + 1,
        options.num_workers if options.use_gpu else 0,
        why="train.num_workers, train.cpus_per_worker, train.use_gpu, and one CPU to feed the workers",
    )
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from dpo_ray.on_ray.feeding import StepFeed, feed_dataset

    runs = location / "checkpoints"
    name = run_name(runs)

    def feed() -> Any:
        return feed_dataset(plan, earliest_resume(runs / name), options.num_workers, options.tokens_per_microbatch)

    resources = {"CPU": options.cpus_per_worker, **({"GPU": 1.0} if options.use_gpu else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "model": config.model,
            "train": options,
            "seed": config.run.seed,
            "num_steps": plan.num_steps,
            "pairs_per_epoch": len(plan.index),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=options.num_workers, use_gpu=options.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=runs.uri,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=options.keep_checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=options.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
        torch_config=TorchConfig(backend="nccl" if options.use_gpu else "gloo"),
        datasets={"train": feed},
        dataset_config=StepFeed(),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raise_ours(error, KIND)
    if result.error is not None:
        raise_ours(result.error, KIND)
    assert result.checkpoint is not None
    path = result.checkpoint.path
    return Location(path) if Location(path).is_local else Location.of(f"{runs.uri.split('://')[0]}://{path}")


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
            say(KIND, f"{record} is damaged, so its checkpoints cannot be used: training begins again")
            number += 1


def earliest_resume(run: Location) -> int:
    """A step that no checkpoint which Ray may resume from comes before; workers pass over what they have done.

    Which checkpoint Ray takes is known only on the workers, after the feed is built. Feeding from too early costs
    little, from too late would leave steps out.
    """
    if not (run / _SNAPSHOT).exists():
        return 0
    histories = [folder / HISTORY for folder in run.list() if folder.name.startswith("checkpoint_")]
    # A checkpoint that is half uploaded or half removed may lack it; Ray does not resume from that one.
    complete = [history.read_bytes() for history in histories if history.exists()]
    return min((json.loads(lines.splitlines()[-1])["step"] for lines in complete), default=0)


def train_worker(job: dict[str, Any]) -> None:
    """What Ray Train runs on each worker: the loop, with Ray's feed, report and checkpoint put in."""
    import ray.train
    import ray.train.torch

    from dpo_ray.on_ray.feeding import received_steps

    # Ray prints all metrics of a report on every rank, by a logger outside its own tree; they are in metrics.jsonl.
    logging.getLogger().setLevel(logging.WARNING)
    context = ray.train.get_context()
    options = job["train"]
    if not options.use_gpu:
        torch.set_num_threads(max(1, int(options.cpus_per_worker)))
    me = Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        kept = ray.train.Checkpoint.from_directory(str(checkpoint)) if checkpoint is not None else None
        ray.train.report(metrics, checkpoint=kept)
        if kept is not None:
            say(KIND, f"checkpoint at step {metrics['step']}/{job['num_steps']}")

    arguments = {
        "seed": job["seed"],
        "num_steps": job["num_steps"],
        "pairs_per_epoch": job["pairs_per_epoch"],
        "me": me,
        "steps_from": lambda start: received_steps(ray.train.get_dataset_shard("train"), me.rank, start),
        "report": report,
    }
    latest = ray.train.get_checkpoint()
    if latest is None:
        train(job["model"], options, resume=None, **arguments)
        return
    with latest.as_directory() as folder:
        if me.rank == 0:
            say(KIND, f"going on from checkpoint {Path(folder).name}")
        train(job["model"], options, resume=Path(folder), **arguments)


def _collect(checkpoint: Location, location: Location) -> list[dict[str, Any]]:
    """Copy the exported model and the metrics of the last checkpoint into the artifact."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / HISTORY).write_bytes((checkpoint / HISTORY).read_bytes())
        history = read_history(Path(scratch))
    source, source_path = (checkpoint / EXPORT).filesystem()
    target, target_path = (location / MODEL_FOLDER).filesystem()
    target.create_dir(target_path, recursive=True)
    pafs.copy_files(source_path, target_path, source_filesystem=source, destination_filesystem=target)
    (location / HISTORY).write_bytes((checkpoint / HISTORY).read_bytes())
    return history


def _remove_runs(location: Location) -> None:
    """The checkpoints have served once the artifact is published."""
    runs = location / "checkpoints"
    if runs.is_local:
        shutil.rmtree(runs.uri, ignore_errors=True)
    else:
        fs, path = runs.filesystem()
        fs.delete_dir(path)
