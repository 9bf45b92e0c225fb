"""Optimizer, learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_ray.config import Train
from dpo_ray.model.libraries import require_torchao

BLOCK = 256
"""Values that share a scale in moments of 8 bits (arXiv:2110.02861)."""


def make_optimizer(model: nn.Module, config: Train, *, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), fused in float32, and torchao's otherwise; biases and norms do not decay.

    Args:
        seed: of the rounding of weights in bfloat16: the same where workers hold the same weights.

    Raises ConfigError where torchao is needed and not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": (0.9, 0.999), "eps": 1e-8}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    require_torchao(config.optimizer)
    return _in_few_bytes(groups, options, config, seed)


def _in_few_bytes(
    groups: list[dict[str, Any]], options: dict[str, Any], config: Train, seed: int
) -> torch.optim.Optimizer:
    _quiet_torchao()
    from torchao.optim import AdamW8bit, _AdamW
    from torchao.optim.subclass_8bit import OptimState8bit

    base: Any = AdamW8bit if "8bit" in config.optimizer else _AdamW
    sizes = {"block_size": BLOCK} if "8bit" in config.optimizer else {}

    class AdamW(base):  # type: ignore[misc]
        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            # In the weight's own dtype, a part of a sharded moment in bfloat16 would say that it is in float32.
            zeros: Tensor = OptimState8bit.zeros(p.shape, signed, block_size, p.device)
            return zeros

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            # Rounded to bfloat16 a mean of squares would never fall again: it does so by a thousandth a step.
            made: Tensor = super()._new_buffer(p if signed else p.detach().float(), signed)
            return made

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            # torch has brought all that is in plain floats to the weight's dtype.
            numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
            weights = [p for group in self.param_groups for p in group["params"]]
            for number, p in zip(numbers, weights, strict=True):
                saved = state_dict["state"].get(number, {}).get("exp_avg_sq")
                if type(_local(saved)) is Tensor:
                    self.state[p]["exp_avg_sq"] = saved.to(p.device, copy=True)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            weights = [p for group in self.param_groups for p in group["params"]]
            done = self.state[weights[0]].get("step", 0) if self.state else 0
            device = weights[0].device
            with _eager(device), _drawn(device, f"{seed} {int(done)}"):
                return super().step(closure)

    made: torch.optim.Optimizer = AdamW(groups, **options, **sizes, bf16_stochastic_round=config.in_bfloat16)
    return made


def _local(value: Any) -> Any:
    """A rank's own part of what is sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def _quiet_torchao() -> None:
    # It warns of kernels for GPUs that it brings and cannot load, and torch of how it registers an enumeration; neither
    # is used here.
    logging.getLogger("torchao").setLevel(logging.ERROR)


def _eager(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU torchao compiles its step, a kernel for a weight; on CPU that takes longer than most trainings."""
    return torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext()


@contextmanager
def _drawn(device: torch.device, seed: str) -> Iterator[None]:
    """Inside, what is drawn is drawn from the seed; afterwards all generators are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random.Random(seed).getrandbits(32))  # torch's generator for CPUs takes no more bits
        yield


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of the next step, for all weights."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao takes no other
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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
