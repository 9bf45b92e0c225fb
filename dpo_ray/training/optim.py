"""Optimizer, learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpo_ray.config import Train


def make_optimizer(model: nn.Module, config: Train) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused; biases and norms do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def learning_rate(step: int, num_steps: int, config: Train) -> float:
    """Learning rate of a step counted from 0: linear warm-up, then cosine or linear decay to 0, or constant."""
    warmup = math.ceil(round(config.warmup_fraction * num_steps, 9))  # .07 · 100 is a little over 7 in floats
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.learning_rate * factor[config.schedule]


class WeightAverage:
    """Exponential moving average of the trained parameters, shard by shard where they are sharded."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._values = {name: p.detach().clone() for name, p in self._parameters.items()}

    def named_values(self) -> dict[str, Tensor]:
        """The averages themselves, by the parameters' names; writing into them changes the average."""
        return self._values

    @torch.no_grad()
    def update(self) -> None:
        """average ← decay · average + (1 − decay) · weights, after an optimizer step."""
        torch._foreach_lerp_(list(self._values.values()), list(self._parameters.values()), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's weights are the averages; afterwards they are as before."""
        trained = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self._values)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
