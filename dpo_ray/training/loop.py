"""The training loop, as one worker runs it. No Ray here: pairs come in as steps, metrics and checkpoints go out."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from dpo_ray.config import Model, Train
from dpo_ray.errors import NonFiniteLoss
from dpo_ray.model.export import export_policy
from dpo_ray.model.policy import CompletionScorer, compile_layers, load_policy, torch_dtype
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.progress import Progress, say
from dpo_ray.training.batch import Share, Step
from dpo_ray.training.checkpoint import TrainState, load_checkpoint, load_weights, save_checkpoint
from dpo_ray.training.files import EXPORT, num_skipped
from dpo_ray.training.optim import WeightAverage, learning_rate, make_optimizer
from dpo_ray.training.parallel import Rank, parallelize, whole_state
from dpo_ray.training.selection import best_step, should_stop
from dpo_ray.training.step import Learner, RequireReference


class Checkpoints(Protocol):
    """Where checkpoints are kept."""

    def keep(self, metrics: dict[str, Any], folder: Path, *, last: bool) -> None:
        """Take this rank's part of a checkpoint, and the folder with it; every rank calls it.

        It may return before the checkpoint is safe, unless it is the last one.
        """

    def report(self, metrics: dict[str, Any]) -> None:
        """Tell of an evaluation without a checkpoint, to who steers from outside; every rank calls it."""

    def steps(self) -> set[int]:
        """The steps after which a checkpoint was kept that is still there; every rank calls it."""

    def of_step(self, step: int) -> AbstractContextManager[Path]:
        """A folder with the whole checkpoint that was kept after a step; every rank calls it."""


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
    resume: Path | None,
    require_reference: RequireReference | None,
) -> TrainState:
    """Train the policy from its start, or from a checkpoint folder, to the last step. Returns where it ended.

    Args:
        num_steps: optimizer steps over all epochs.
        steps_from: given a step, this rank's share of it and of all that follow, in order.
        held_out: this rank's share of the pairs that are evaluated every `eval_every_steps`.
        resume: folder of the checkpoint to go on from.
        require_reference: called at the first step, where policy and reference are the same still.

    Raises NonFiniteLoss or ReferenceMismatch, each on every rank alike; DataError where a pair lacks what the loss
    needs.
    """
    torch.manual_seed(seed + me.rank)
    folder = ModelFolder.of(model)
    policy = load_policy(
        folder.path,
        trust_remote_code=folder.trust_remote_code,
        lora=model.lora,
        seed=seed,
        activation_checkpointing=options.activation_checkpointing,
    )
    scorer = CompletionScorer(policy).to(me.device).train()
    if options.compile:
        compile_layers(policy)
    forward = parallelize(scorer, options.strategy, me, torch_dtype(model.dtype))
    optimizer = make_optimizer(policy, options)
    average = WeightAverage(policy, options.ema_decay) if options.ema_decay is not None else None
    state = TrainState()
    if resume is not None:
        state = load_checkpoint(resume, policy=policy, optimizer=optimizer, average=average, me=me)
    learner = Learner(forward, scorer, optimizer, average, options, me, state)
    progress = Progress("train", num_steps, "steps", done=state.next_step)
    num_tokens = state.history[-1]["num_tokens"] if state.history else 0
    if state.finished:
        return state  # the last checkpoint is already kept; only its publication was interrupted

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
        scheduled = number == num_steps or number % options.checkpoint_every_steps == 0
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
            _checkpoint(learner, metrics, checkpoints, model=model, source=folder.path)
        elif eval_due:
            checkpoints.report(metrics)
        if state.finished:
            break
    return state


def _checkpoint(
    learner: Learner, metrics: dict[str, Any], checkpoints: Checkpoints, *, model: Model, source: Path
) -> None:
    """Hand over a checkpoint of this moment; the last one holds the exported model too."""
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
            with checkpoints.of_step(state.exported_step) as kept:
                load_weights(kept, policy=policy, average=average)
        with average.in_place() if average is not None else nullcontext():
            weights = whole_state(policy)
            if me.rank == 0:
                export_policy(folder / EXPORT, policy=policy, source=source, options=model, state=weights)
    checkpoints.keep(metrics, folder, last=state.finished)


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
