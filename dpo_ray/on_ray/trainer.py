"""Training on Ray Train: scored pairs in, a train artifact with the policy in it out."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_ray.config import Config, Model, Train, backend
from dpo_ray.config.tolerance import Limits
from dpo_ray.errors import DamagedCheckpoint, DpoRayError
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray.failures import raise_ours, reason_of
from dpo_ray.on_ray.resume import newest_whole_checkpoint, resumed_step, run_name, state_of
from dpo_ray.on_ray.room import Need
from dpo_ray.on_ray.session import connect
from dpo_ray.on_ray.usage import used
from dpo_ray.on_ray.worker_memory import least_memory
from dpo_ray.progress import aside, say
from dpo_ray.storage.artifact import Artifact, Contents, FileEntry, load, make, place
from dpo_ray.storage.claim import claim
from dpo_ray.storage.finished import about_to_compute
from dpo_ray.storage.lease import Lease, WhenBusy, hold
from dpo_ray.storage.location import Location
from dpo_ray.tracking.steps import steps_folder
from dpo_ray.training.files import HISTORY, KIND, MODEL_FOLDER, exported_files, num_skipped
from dpo_ray.training.index import PlanIndex, index_in_use
from dpo_ray.training.longest import LongestPair, LongestPairs
from dpo_ray.training.mixture import by_source, mixture_lines
from dpo_ray.training.plan import ORDER, StepPlan, make_plan
from dpo_ray.training.selection import higher_is_better
from dpo_ray.training.steps import Steps

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


@dataclass(frozen=True)
class Steering:
    """What of a training is in the hands of who steers it from outside."""

    make_trainer: Callable[..., TorchTrainer] | None = None
    """Takes the arguments of TorchTrainer in its place."""
    whose: str | None = None
    """Its lines are for the log alone, and named by this."""
    tokens_per_microbatch: int | None = None
    """What fits into the memory of one worker, found out once for many trainings."""
    told_to: Location | None = None
    """The file that says how the training stands while it goes on, for who looks from outside."""
    stop: Callable[[], None] | None = None
    """Ends the training from another thread, where it runs in no main thread, which could be interrupted."""
    while_waiting: Callable[[], None] = lambda: None
    """Called again and again while another run is at the same training; what it raises ends the wait."""


def train_policy(
    output: Location, config: Config, rows: Artifact, steering: Steering | None = None, *, run_id: str
) -> tuple[Artifact, bool]:
    """Train the policy on finished pairs, or take over the artifact if it is finished already.

    The artifact holds the model as a Hugging Face folder, and the metrics of every logged step. A run that was
    killed goes on from its last checkpoint. Of several runs that come to the same training one trains, and the others
    wait for it or leave (run.when_busy).

    Args:
        rows: what the loss needs: the reference artifact, with mismatched completions for KTO; the tokenized pairs
            for a loss without reference.
        run_id: by which other runs know this one.

    Raises Busy where another run is at it and this one leaves, LeaseLost where another one has taken it over.
    """
    steering = steering or Steering()
    if steering.whose is not None:
        aside(steering.whose)
    identity, inputs = _known_by(config, rows)
    location = place(output, KIND, identity, inputs)

    with claim(output, location, inputs, ()):
        artifact, reused = load(location, KIND, location.name), True
    if artifact is None:
        about_to_compute(location)
        waiting = {"while_waiting": steering.while_waiting, "on_lost": steering.stop}
        with training_lease(output, location, run_id=run_id, when_busy=config.run.when_busy, **waiting) as lease:

            def compute(location: Location) -> Contents:
                contents = _train(output, config, rows, location, steering)
                lease.require()
                return contents

            artifact, reused = make(output, KIND, identity, inputs, compute)
            if not reused:
                _remove_runs(location)
    if reused:
        say(KIND, f"reused: {artifact.location}")
    return artifact, reused


def training_lease(
    output: Location, location: Location, *, run_id: str, when_busy: WhenBusy, **options: Any
) -> AbstractContextManager[Lease]:
    """Held by who works on a training, or removes what is left of one. See dpo_ray.storage.lease.hold."""
    what, name = f"The training {location}", f"{KIND}-{location.name}"
    return hold(output, name, what, run_id=run_id, when_busy=when_busy, tell=lambda line: say(KIND, line), **options)


def train_location(output: Location, config: Config, rows: Artifact) -> Location:
    """Where the artifact of a training lies, finished or not."""
    return place(output, KIND, *_known_by(config, rows))


def _known_by(config: Config, rows: Artifact) -> tuple[dict[str, Any], dict[str, str]]:
    """Identity and inputs of the artifact."""
    identity = {
        "weights": ModelFolder.of(config.model).weights_hash(),
        "dtype": config.model.dtype,
        "lora": config.model.lora.identity() if config.model.lora else None,
        "train": config.train.identity(),
        "seed": config.run.seed,
        "order": ORDER,
        **({"mixture": config.data.weights} if config.data.weights is not None else {}),
    }
    return identity, {"pairs": rows.fingerprint}


def _train(output: Location, config: Config, rows: Artifact, location: Location, steering: Steering) -> Contents:
    """Run the training, or what is left of it, in the artifact's location."""
    from dpo_ray.losses.objective import zero_margin_loss  # with torch, which only a training needs

    plan, held_out = make_plan(output, config, rows)
    say(KIND, f"{len(plan.index)} pairs, {plan.num_steps} steps of {config.train.global_batch_size} pairs")
    of_sources = plan.trained()
    for line in mixture_lines(of_sources):
        say(KIND, line)
    began = time.monotonic()
    with index_in_use(plan.index, rows):
        checkpoint = _run_from_what_is_sound(config, plan, held_out, location, steering, _limits(config, rows))
    metrics = (checkpoint / HISTORY).read_bytes()
    (location / HISTORY).write_bytes(metrics)
    history = [json.loads(line) for line in metrics.splitlines()]
    state = state_of(checkpoint)
    exported_step = state["exported_step"]
    model_files = [
        file.model_copy(update={"name": f"{MODEL_FOLDER}/{file.name}"}) for file in exported_files(checkpoint)
    ]
    of_metrics = FileEntry(name=HISTORY, rows=None, bytes=len(metrics), sha256=hashlib.sha256(metrics).hexdigest())
    shifted = {"margin", "preference"} & set(plan.index.facts.says)  # then it depends on the pairs
    return Contents(
        files=[*model_files, of_metrics],
        counters={
            "read": plan.index.read,
            "kept": len(plan.index),
            "other_split": plan.index.read - len(plan.index),
            "steps_left_out": num_skipped(history),
        },
        metrics={
            "first_step_loss": history[0].get("loss") if history[0]["step"] == 1 else None,
            "zero_margin_loss": None if shifted else zero_margin_loss(config.train.loss),
            "final": history[-1],
            "num_steps": history[-1]["step"],
            "planned_steps": plan.num_steps,
            "published_step": exported_step,
            "layout": state.get("layout"),
            "tokens_per_second": sum(m["tokens_per_second"] for m in history) / len(history),
            "seconds": round(time.monotonic() - began, 1),
            "steps": Steps.of(history, config.train).as_dict(),
            "sources": by_source(of_sources, history),
        },
    )


def _limits(config: Config, rows: Artifact) -> Limits | None:
    """What policy and reference may differ by at the first step; None where they are two models, as in later rounds
    with the first model as the reference."""
    of_reference = rows.manifest.identity.get("weights")
    if of_reference is not None and of_reference != ModelFolder.of(config.model).weights_hash():
        return None
    return config.reference.tolerance.limits(config.model.dtype)


def _run_from_what_is_sound(*arguments: Any) -> Location:
    """_run, and again from an earlier checkpoint, or from the start, for each that turns out to be damaged."""
    while True:
        try:
            return _run(*arguments)
        except DamagedCheckpoint as error:  # its worker has left it out
            say(KIND, f"{error} It is left out, and the training goes on from the one before it")


def _run(
    config: Config,
    plan: StepPlan,
    held_out: PlanIndex,
    location: Location,
    steering: Steering,
    reference_limits: Limits | None,
) -> Location:
    """Run the workers to the last step. Returns where the last checkpoint is."""
    options = config.train
    connect(training_need(config), trains=True)
    used(options.num_workers, options.gpus)
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from dpo_ray.on_ray.stream import TRAIN, StepFeed, placeholder
    from dpo_ray.on_ray.train_worker import TrainJob, train_worker

    microbatch = steering.tokens_per_microbatch or tokens_per_microbatch(config)
    runs = location / "checkpoints"
    name = run_name(runs)
    filesystem, storage_path = runs.filesystem()

    def reached() -> int:
        return resumed_step(runs / name, fallback)

    fallback = newest_whole_checkpoint(runs)
    place = config.placement.training
    resources = {"CPU": options.cpus_per_worker, **({"GPU": options.gpus} if options.use_gpu else {}), **place.taken}
    trainer = (steering.make_trainer or TorchTrainer)(
        train_worker,
        train_loop_config={
            "job": TrainJob(
                model=config.model,
                options=options,
                seed=config.run.seed,
                num_steps=plan.num_steps,
                pairs_per_epoch=len(plan.index),
                hidden_size=plan.hidden_size,
                held_out=held_out.drawn(options.eval_pairs) if options.eval_every_steps is not None else None,
                longest=_longest_pairs(plan.index),
                tokens_per_microbatch=microbatch,
                reference_limits=reference_limits,
                run=runs / name,
                export_to=location / MODEL_FOLDER,
                sources=plan.index.sources,
                whose=steering.whose,
                name=config.run.name,
                told_to=steering.told_to,
                steps=steps_folder(location),
                fallback=fallback,
            )
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=(options.min_workers, options.num_workers) if options.min_workers else options.num_workers,
            use_gpu=options.use_gpu,
            resources_per_worker=resources,
            label_selector=place.label_selector or None,
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
        torch_config=TorchConfig(backend=backend(options.use_gpu, options.offload)),
        datasets={TRAIN: placeholder},
        dataset_config=StepFeed(plan, microbatch, reached, runs / "reading", place),
    )
    try:
        with _ctrl_c_as_before():
            result = trainer.fit()
    except Exception as error:
        raise_ours(error, KIND)
    if result.error is not None:
        raise_ours(result.error, KIND)
    if isinstance(result.return_value, DpoRayError):
        raise result.return_value
    assert result.checkpoint is not None
    return runs.same_store(result.checkpoint.path)


@contextmanager
def _ctrl_c_as_before() -> Iterator[None]:
    """Ray Train's own answer to SIGINT ends the training, and would stay: later stages could not be interrupted."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def training_need(config: Config) -> Need:
    """Of the workers that a training cannot do without."""
    options = config.train
    return Need(
        "train.num_workers or min_workers, cpus_per_worker, use_gpu",
        processes=options.min_workers or options.num_workers,
        cpus=options.cpus_per_worker,
        gpus=options.gpus,
        wanted_cpus=options.num_workers * options.cpus_per_worker + 1,  # the stages after this one read and write too
        place=config.placement.training,
    )


def _longest_pairs(index: PlanIndex) -> LongestPairs:
    longest, widest = index.facts.longest, index.facts.widest
    assert longest is not None and widest is not None  # a plan has a step
    return LongestPairs(packed=_pair_at(index, longest), padded=_pair_at(index, widest))


def _pair_at(index: PlanIndex, place: int) -> LongestPair:
    import numpy as np

    from dpo_ray.on_ray.stream import read_share

    at = np.array([place])
    [pair] = read_share(index, at, 0, 1, int(index.lengths[place].sum()), 1).pairs
    return LongestPair(pair, index.shards[int(index.shard_of(at)[0])], int(index.row[place]))


def tokens_per_microbatch(config: Config) -> int:
    """As configured, or what fits into the memory that a worker has on every node. Ray must be connected."""
    options, place = config.train, config.placement.training
    if options.tokens_per_microbatch != "auto":
        return options.tokens_per_microbatch
    import ray

    task = ray.remote(num_cpus=0, max_calls=1, **place.options_of_labels)(_tokens_that_fit)
    try:
        tokens: int = ray.get(task.remote(config.model, options, least_memory(options, place)))
    except Exception as error:
        raise_ours(error, KIND)
    say(KIND, f"micro-batches of at most {tokens} tokens (train.tokens_per_microbatch=auto)")
    return tokens


def tokens_per_second(config: Config, index: PlanIndex) -> float | None:
    """Of a training, tried out on a worker with the first pairs of the index. Ray must be connected.

    None where a worker does not hold the whole model, or where it failed there: nothing depends on it.
    """
    options, place = config.train, config.placement.training
    if options.strategy == "fsdp":
        return None
    import ray

    few = index.drawn(_TRIED_PAIRS)
    resources = {"num_cpus": options.cpus_per_worker, "num_gpus": options.gpus, **place.options}
    task = ray.remote(max_calls=1, **resources)(_speed_of_a_worker)
    try:
        found: float = ray.get(task.remote(config.model, options, few))
    except ray.exceptions.RayError as error:
        say(KIND, f"how fast a worker trains could not be tried out: {reason_of(error)}")
        return None
    return options.num_workers * found


_TRIED_PAIRS = 8


def _speed_of_a_worker(model: Model, train: Train, index: PlanIndex) -> float:
    import numpy as np
    import torch

    from dpo_ray.on_ray.stream import read_share
    from dpo_ray.training.speed import tokens_per_second

    if not train.use_gpu:
        torch.set_num_threads(max(1, int(train.cpus_per_worker)))
    pairs = read_share(index, np.arange(len(index)), 0, 1, int(index.lengths.sum()) + 1, 1024).pairs
    return tokens_per_second(model, train, pairs, torch.device("cuda" if train.use_gpu else "cpu"))


def _tokens_that_fit(model: Model, train: Train, memory: int) -> int:
    from dpo_ray.training.memory import shape_of, tokens_that_fit  # with torch, in the process that asks

    shape = shape_of(ModelFolder.of(model))
    return tokens_that_fit(shape, model, train, memory=memory, num_workers=train.min_workers or train.num_workers)


def _remove_runs(location: Location) -> None:
    """The checkpoints have served once the artifact is published."""
    runs = location / "checkpoints"
    try:
        runs.remove_folder()
    except OSError as error:
        say(KIND, f"{runs} could not be removed ({error}); nothing needs it any more")
