"""The training loop, as one worker runs it. No Ray here: pairs come in as steps, metrics and checkpoints go out."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from dpo_ray.config import Model, Train
from dpo_ray.errors import NonFiniteLoss
from dpo_ray.model.resolve import ModelFolder, adapter_base
from dpo_ray.progress import Progress, say
from dpo_ray.storage.artifact import FileEntry
from dpo_ray.storage.location import Location
from dpo_ray.training.batch import Share, Step
from dpo_ray.training.checkpoint import TrainState, load_checkpoint, load_weights, save_checkpoint
from dpo_ray.training.export import export_policy
from dpo_ray.training.files import EXPORTED, num_skipped
from dpo_ray.training.longest import LongestPairs
from dpo_ray.training.optim import WeightAverage, learning_rate, make_optimizer
from dpo_ray.training.parallel import Rank, part_of
from dpo_ray.training.rehearsal import require_that_it_fits
from dpo_ray.training.selection import best_step, should_stop
from dpo_ray.training.start import fetch, start_policy
from dpo_ray.training.step import Learner, RequireReference


class Checkpoints(Protocol):
    """Where checkpoints are kept."""

    def keep(self, metrics: dict[str, Any], folder: Path, *, wait: bool) -> None:
        """Take this rank's part of a checkpoint, and the folder with it; every rank calls it.

        Without `wait` it may return before the checkpoint is safe.
        """

    def report(self, metrics: dict[str, Any]) -> None:
        """Tell of an evaluation without a checkpoint, to who steers from outside; every rank calls it."""

    def steps(self) -> set[int]:
        """The steps after which a checkpoint was kept that is still there; every rank calls it."""

    def of_step(self, step: int) -> Location:
        """Where the checkpoint lies that was kept after a step; every rank calls it."""


def train(
    model: Model,
    options: Train,
    *,
    seed: int,
    num_steps: int,
    pairs_per_epoch: int,
    me: Rank,
    steps_from: Callable[[int], Iterable[Step]],
    held_out: Share | None,
    checkpoints: Checkpoints,
    export_to: Location,
    resume: Location | None,
    require_reference: RequireReference | None,
    longest: LongestPairs | None = None,
    memory: int = 0,
    sources: tuple[str, ...] = (),
    is_forewarned: Callable[[], bool] = lambda: False,
    told: Callable[[dict[str, Any], int], None] = lambda metrics, num_tokens: None,
) -> TrainState:
    """Train the policy from its start, or from a checkpoint, to the last step. Returns where it ended.

    Args:
        num_steps: optimizer steps over all epochs.
        steps_from: given a step, this rank's share of it and of all that follow, in order.
        held_out: this rank's share of the pairs that are evaluated every `eval_every_steps`.
        export_to: the folder of the trained model; it is written before the last checkpoint is kept.
        resume: the checkpoint to go on from, wherever it lies; each rank reads its part.
        require_reference: called at the first step, where policy and reference are the same still.
        longest: the longest of all pairs, for which there must be memory; None: it is not looked at.
        memory: bytes of this rank, where `longest` is given.
        sources: of a mixture, those that metrics are told apart by.
        is_forewarned: whether a worker is about to be lost, and what was done should be kept now. Every rank calls it
            after each step, and is told the same.
        told: given the metrics of each step, one that was left out included, and its tokens; every rank calls it.

    Raises NonFiniteLoss, ReferenceMismatch or PairTooLong, each on every rank alike; DataError where a pair lacks what
    the loss needs; ConfigError where the adapter that is to be exported would have no base that is kept.
    """
    torch.manual_seed(seed + me.rank)
    folder = ModelFolder.of(model)
    adapter_alone = model.lora is not None and model.lora.export == "adapter"
    base = adapter_base(model) if adapter_alone else None
    fetch(folder, me)
    scorer, forward = start_policy(folder, model, options, me, seed=seed)
    policy = scorer.model
    part = part_of(me, options.sharding).number if options.strategy == "fsdp" else 0
    optimizer = make_optimizer(policy, options, seed=(seed << 16) + part)
    average = WeightAverage(policy, options.ema_decay) if options.ema_decay is not None else None
    state = TrainState()
    if resume is not None:
        state = load_checkpoint(resume, policy=policy, optimizer=optimizer, average=average, me=me)
    state.layout = scorer.layout
    learner = Learner(forward, scorer, optimizer, average, options, me, state, sources)
    progress = Progress("train", num_steps, "steps", done=state.next_step)
    num_tokens = state.history[-1]["num_tokens"] if state.history else 0
    if state.finished:
        return state  # the last checkpoint is already kept; only its publication was interrupted
    if longest is not None:
        require_that_it_fits(learner, longest.packed if scorer.packs else longest.padded, model, memory)

    for step in steps_from(state.next_step):
        began = time.monotonic()
        number = step.number + 1
        rate = learning_rate(step.number, num_steps, options)
        at_start = step.number == 0 and options.loss.needs_reference
        every = options.entropy_every_steps
        result = learner.step(
            step.share,
            rate,
            require_reference if at_start else None,
            with_entropies=every is not None and number % every == 0,
        )
        num_tokens += result.num_tokens
        metrics = result.record() | {
            "step": number,
            "epoch": number * options.global_batch_size / pairs_per_epoch,
            "learning_rate": rate,
            "tokens_per_second": result.num_tokens / (time.monotonic() - began),
            "num_tokens": num_tokens,
        }
        eval_due = options.eval_every_steps is not None and (
            number % options.eval_every_steps == 0 or number == num_steps
        )
        if eval_due and held_out is not None:
            with average.in_place() if average is not None else nullcontext():
                metrics |= learner.evaluate(held_out)
        told(metrics, result.num_tokens)
        forewarned = is_forewarned()
        scheduled = number == num_steps or number % options.checkpoint_every_steps == 0 or forewarned
        if scheduled or eval_due or result.skipped or number % options.log_every_steps == 0:
            state.history.append(metrics)
        if me.rank == 0:
            progress.advance(1, "left out" if result.skipped else _note(metrics))
            if eval_due:
                say("train", _evaluation_note(number, metrics))
        if result.skipped:
            _count_skipped(result.skipped_pairs, state, options, number, me)
        state.next_step = number
        state.finished = number == num_steps or (
            eval_due and options.early_stopping is not None and should_stop(state.history, options.early_stopping)
        )
        if state.finished or scheduled or (eval_due and options.keep_best):
            export = partial(
                export_policy, export_to, policy=policy, source=folder.path, options=model, dtype=options.export_dtype,
                me=me, base=base,
            )  # fmt: skip
            _checkpoint(learner, metrics, checkpoints, export, wait=forewarned)
        elif eval_due:
            checkpoints.report(metrics)
        if state.finished:
            break
    return state


def _checkpoint(
    learner: Learner,
    metrics: dict[str, Any],
    checkpoints: Checkpoints,
    export: Callable[[], list[FileEntry]],
    *,
    wait: bool,
) -> None:
    """Hand over a checkpoint of this moment; before the last one the model is exported.

    Args:
        wait: until it is safe, which the last one always is.
    """
    policy, state, me = learner.scorer.model, learner.state, learner.me
    keep_best = learner.options.keep_best
    if state.finished:
        # A checkpoint may be gone that was lost with a damaged record; the best of the others is taken then.
        best = None
        if keep_best is not None:
            best = best_step(state.history, keep_best, among=checkpoints.steps() | {state.next_step})
        state.exported_step = best or state.next_step
    folder = Path(tempfile.mkdtemp(prefix="dpo-ray-checkpoint-"))  # whoever keeps it removes it
    save_checkpoint(folder, policy=policy, optimizer=learner.optimizer, average=learner.average, state=state, me=me)
    if state.finished:
        average = learner.average
        if state.exported_step != state.next_step:
            if me.rank == 0:
                say("train", f"the weights of step {state.exported_step} were best by {keep_best}; they are exported")
            load_weights(checkpoints.of_step(state.exported_step), policy=policy, average=average)
        with average.in_place() if average is not None else nullcontext():
            files = export()
        if me.rank == 0:
            (folder / EXPORTED).write_text(json.dumps([file.model_dump() for file in files]))
    checkpoints.keep(metrics, folder, wait=wait or state.finished)


def _count_skipped(pairs: Sequence[str], state: TrainState, options: Train, number: int, me: Rank) -> None:
    """Say which pairs were in the step; raise NonFiniteLoss where it was one step too many."""
    skipped = num_skipped(state.history)
    told = (
        f"Step {number}: the loss or the gradient is not finite. The weights were left as they were. The step's pairs: "
        f"{', '.join(pairs[:8])}{f', and {len(pairs) - 8} more' if len(pairs) > 8 else ''}."
    )
    if skipped > options.max_nonfinite_steps:
        raise NonFiniteLoss(
            f"{told} That makes {skipped} such steps, and train.max_nonfinite_steps={options.max_nonfinite_steps} "
            "allows no more. Lower train.learning_rate, train in float32, or look at these pairs; the last checkpoint "
            "is kept."
        )
    if me.rank == 0:
        say("train", f"{told} {skipped} of at most {options.max_nonfinite_steps} such steps")


def _note(metrics: dict[str, Any]) -> str:
    accuracy = f" · accuracy {metrics['rewards/accuracies']:.2f}" if "rewards/accuracies" in metrics else ""
    return f"loss {metrics['loss']:.4f}{accuracy} · {metrics['tokens_per_second']:.0f} tokens/s"


def _evaluation_note(number: int, metrics: dict[str, Any]) -> str:
    shown = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    return f"held-out pairs after step {number}: " + " · ".join(
        f"{name.removeprefix('eval_')} {metrics[name]:.4f}" for name in shown if name in metrics
    )
