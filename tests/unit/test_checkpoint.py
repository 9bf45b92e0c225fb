"""A checkpoint restores everything that the next step depends on, bit for bit."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpo_ray.checkpoint import load_checkpoint, read_history, save_checkpoint
from dpo_ray.config import Train
from dpo_ray.optim import make_optimizer

HISTORY = [{"step": 1, "loss": 0.6931471805599453}, {"step": 2, "loss": 1e-300}]


class Tied(nn.Module):
    """Two names for one weight, as in models whose head is their embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids)))


def trained(steps: int, seed: int = 0) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = make_optimizer(model, Train(learning_rate=0.1, weight_decay=0.1))
    advance(model, optimizer, steps)
    return model, optimizer


def advance(model: Tied, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps on random inputs: what they do depends on parameters, optimizer state and random state."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(5, (4,))).square().sum().backward()
        optimizer.step()


def save(folder: Path, model: Tied, optimizer: torch.optim.Optimizer) -> None:
    save_checkpoint(folder, model=model, optimizer=optimizer, next_step=3, history=HISTORY)


def test_the_step_and_the_metrics_come_back_exactly(tmp_path: Path):
    save(tmp_path, *trained(2))
    model, optimizer = trained(0, seed=1)
    assert load_checkpoint(tmp_path, model=model, optimizer=optimizer) == (3, HISTORY)
    assert read_history(tmp_path) == HISTORY


def test_parameters_and_optimizer_come_back_bit_for_bit(tmp_path: Path):
    before, optimizer_before = trained(3)
    save(tmp_path, before, optimizer_before)
    after, optimizer_after = trained(1, seed=1)
    assert not torch.equal(after.embed.weight, before.embed.weight)
    load_checkpoint(tmp_path, model=after, optimizer=optimizer_after)
    for mine, restored in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(mine, restored)
        for name, value in optimizer_before.state[mine].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer_after.state[restored][name])), name
    assert after.head.weight is after.embed.weight


def test_going_on_from_a_checkpoint_is_going_on_without_stopping(tmp_path: Path):
    model, optimizer = trained(2)
    save(tmp_path, model, optimizer)
    advance(model, optimizer, 3)
    resumed, its_optimizer = trained(0, seed=9)
    load_checkpoint(tmp_path, model=resumed, optimizer=its_optimizer)
    advance(resumed, its_optimizer, 3)
    assert torch.equal(resumed.embed.weight, model.embed.weight)
    assert torch.equal(resumed.norm.weight, model.norm.weight)


def draws() -> list[Any]:
    # A normal draw first: it leaves a second one behind, which is part of the state as well.
    return [
        torch.rand(3).tolist(),
        np.random.standard_normal(),
        np.random.random(3).tolist(),
        random.gauss(0, 1),
        [random.random() for _ in range(3)],
    ]


def test_every_random_state_comes_back(tmp_path: Path):
    model, optimizer = trained(1)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()
    save(tmp_path, model, optimizer)
    expected = draws()
    assert draws() != expected
    load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    assert draws() == expected


def test_a_checkpoint_holds_no_code_that_loading_would_run(tmp_path: Path):
    model, optimizer = trained(1)
    save(tmp_path, model, optimizer)

    class Payload:
        def __reduce__(self) -> Any:
            return (print, ("run on load",))

    torch.save({"optimizer": Payload()}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path, model=model, optimizer=optimizer)
