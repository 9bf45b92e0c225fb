"""The metrics of a training, told by its workers after each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dpo_ray.on_ray.metrics import (
    ACCURACY,
    GPU_MEMORY,
    GRAD_NORM,
    LOSS,
    MARGIN,
    STEPS_LEFT,
    STEPS_SKIPPED,
    TOKENS,
    TOKENS_PER_SECOND,
    count,
    tell,
    tell_progress,
)
from dpo_ray.tracking.steps import StepWriter
from dpo_ray.training.files import KIND, SKIPPED

if TYPE_CHECKING:
    from dpo_ray.config import Train
    from dpo_ray.storage.location import Location
    from dpo_ray.training.parallel import Rank

_OF_PAIRS = {LOSS: "loss", MARGIN: "rewards/margins", ACCURACY: "rewards/accuracies"}
_OF_STEP = {GRAD_NORM: "grad_norm", TOKENS_PER_SECOND: "tokens_per_second"}


class StepMetrics:
    """Called with the metrics of a step, as metrics.jsonl has them, and the number of its tokens.

    Args:
        trial: of a sweep; "" where it is none.
    """

    def __init__(self, me: Rank, num_steps: int, trial: str):
        self.me = me
        self.num_steps = num_steps
        self.trial = trial

    def __call__(self, metrics: dict[str, Any], num_tokens: int) -> None:
        if self.me.device.type == "cuda":
            taken = torch.cuda.memory_reserved(self.me.device)
            tell(GPU_MEMORY, taken, trial=self.trial, rank=str(self.me.rank))
        if self.me.rank != 0:
            return
        tell_progress()
        tell(STEPS_LEFT, self.num_steps - metrics["step"], trial=self.trial)
        count(TOKENS, num_tokens, artifact=KIND)
        count(STEPS_SKIPPED, int(SKIPPED in metrics), trial=self.trial)
        for measure, name in _OF_STEP.items():
            if name in metrics:
                tell(measure, metrics[name], trial=self.trial)
        for pairs, before in (("train", ""), ("held_out", "eval_")):
            for measure, name in _OF_PAIRS.items():
                if before + name in metrics:
                    tell(measure, metrics[before + name], trial=self.trial, pairs=pairs)


class ToldSteps:
    """Tells the steps that metrics.jsonl will have to who follows the training, and all of them to another.

    Args:
        also: called alike.
        before: lines of metrics.jsonl of the steps that the training goes on after.
    """

    def __init__(
        self,
        folder: Location,
        options: Train,
        num_steps: int,
        also: Callable[[dict[str, Any], int], None],
        before: Sequence[Mapping[str, Any]],
    ) -> None:
        self._writer = StepWriter(folder, before=before)
        self._options = options
        self._num_steps = num_steps
        self._also = also

    def __call__(self, metrics: dict[str, Any], num_tokens: int) -> None:
        self._also(metrics, num_tokens)
        step, options = metrics["step"], self._options
        is_due = any(step % every == 0 for every in (options.log_every_steps, options.checkpoint_every_steps))
        if is_due or "eval_loss" in metrics or SKIPPED in metrics or step == self._num_steps:
            self._writer.add(metrics)

    def close(self) -> None:
        """After the last one."""
        self._writer.close()
