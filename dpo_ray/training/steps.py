"""What the steps of a training took, and by what: recorded with it, for who plans the next one. It needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpo_ray.config import Train

_WARM = 1  # steps at the start in which happens what happens once


@dataclass(frozen=True)
class Steps:
    """Of a training to its end."""

    tokens: int
    """In all steps, a prompt counted once for each of its completions."""
    tokens_per_second: float
    """Of all workers together, over the logged steps but the first."""
    execution: dict[str, Any]
    """The options that the speed depends on."""

    @classmethod
    def of(cls, history: Sequence[dict[str, Any]], options: Train) -> Steps:
        """history: metrics of every logged step."""
        warm = history[_WARM:] or history
        # Steps of many tokens are not faster ones: their times count, not their rates.
        tokens = [line["num_tokens"] - before["num_tokens"] for before, line in zip(history, warm, strict=False)]
        if len(history) <= _WARM or history[-1]["step"] - history[0]["step"] + 1 != len(history):
            rates = [line["tokens_per_second"] for line in warm]  # not every step is logged
            rate = len(rates) / sum(1 / one for one in rates)
        else:
            rate = sum(tokens) / sum(n / line["tokens_per_second"] for n, line in zip(tokens, warm, strict=True))
        return cls(history[-1]["num_tokens"], rate, execution(options))

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)


def execution(options: Train) -> dict[str, Any]:
    """What the speed of a worker depends on, beside the model."""
    named = ("use_gpu", "gpus_per_worker", "cpus_per_worker", "strategy", "activation_checkpointing", "compile")
    return {name: getattr(options, name) for name in (*named, "num_workers")}
