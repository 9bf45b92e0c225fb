"""The gradients of a run, as its optimizer gets them: recorded, compared, and falsified to see that it shows.

AdamW divides a gradient by its own size, and so makes a whole step of one that is nothing but rounding. Which way
that step goes is up to the machine's order of summation, and no bound on the weights holds everywhere. With an `eps`
far above the rounding of a gradient its steps are continuous: what is nearly the same before them is so after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_ray.model.policy import CompletionScorer
from dpo_ray.training import loop
from tests.rounding import GRADIENT, distance

SMOOTH_EPS = 1e-3  # of the size of a gradient: 100,000 weights whose gradient's norm is below 1
FILE = "gradients.pt"
Gradients = dict[str, Tensor]
"""By the parameter's name, unsharded and clipped."""


@contextmanager
def recorded(folder: Path, rank: int) -> Iterator[None]:
    """Inside, loop's optimizer is smooth, and rank 0 leaves the gradients of every step taken in the folder."""
    steps: list[Gradients] = []
    make_optimizer = loop.make_optimizer

    def made(model: nn.Module, options: Any, **more: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(model, options, **more)
        for group in optimizer.param_groups:
            group["eps"] = SMOOTH_EPS
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def keep(*_: Any) -> None:
            # A step at a rate of 0 is torch's own, by which it makes room for the state that a checkpoint holds.
            if any(group["lr"] for group in optimizer.param_groups):
                steps.append({name: _whole(p.grad) for name, p in trained.items() if p.grad is not None})

        optimizer.register_step_pre_hook(keep)
        return optimizer

    with mock.patch.object(loop, "make_optimizer", made):
        yield
    if rank == 0:
        torch.save(steps, folder / FILE)


def _whole(gradient: Tensor) -> Tensor:
    """A copy; every rank must call it."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


@contextmanager
def multiplied(factor: float) -> Iterator[None]:
    """Inside, all gradients of this process are wrong by a factor before they travel, while all losses are right."""

    def wrong(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, CompletionScorer) and output.logprobs.requires_grad:
            output.logprobs.register_hook(lambda gradient: gradient * factor)

    handle = nn.modules.module.register_module_forward_hook(wrong)
    try:
        yield
    finally:
        handle.remove()


def read(folder: Path) -> list[Gradients]:
    """Those of every step taken, in order."""
    return torch.load(folder / FILE, weights_only=True)


def furthest(got: Sequence[Gradients], expected: Sequence[Gradients]) -> tuple[float, int, str]:
    """The largest ‖Δg‖ / ‖g‖ of a parameter in a step, which step of these, and which parameter."""
    found = []
    for number, (mine, other) in enumerate(zip(got, expected, strict=True)):
        assert mine.keys() == other.keys()
        assert all(value.any() for value in other.values())
        found += [(distance(mine[name], value), number, name) for name, value in other.items()]
    return max(found)


def require_same(got: Sequence[Gradients], expected: Sequence[Gradients]) -> None:
    """Of as many steps, the same but for rounding."""
    apart, number, name = furthest(got, expected)
    assert apart <= GRADIENT, f"gradient of {name} in step {number}: ‖Δg‖ / ‖g‖ is {apart:.2g}, over {GRADIENT:.2g}"
