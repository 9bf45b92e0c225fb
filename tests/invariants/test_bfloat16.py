"""Training in bfloat16: layers compute in it, while weights, gradients and optimizer stay in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_ray.config import Model
from dpo_ray.errors import ReferenceMismatch
from dpo_ray.storage.location import Location
from dpo_ray.training.files import MODEL_FOLDER, read_history
from tests.rounding import ulps
from tests.training import Gang, Trained, random_pairs, scored, small_model

STEPS, HALF = 12, 6
TOKENS = 16  # of a pair's two completions, at most
SPACING = ulps(1, 0.25, torch.bfloat16)  # of logits below ½: hidden states of norm 8 by rows of norm 8 · 0.02
NEAR = 0.1 / 2 * TOKENS * SPACING
"""A loss moves by β/2 of each log-prob, were all of a pair's off by a spacing and to one side: 1.6e-3."""
OTHER_ORDER = 4 * NEAR / math.sqrt(8 * TOKENS)
"""Roundings of a batch's tokens go either way where nothing but the order of summation differs: four times the root of
their number, of which the loss takes the mean: 5.5e-4."""


@pytest.fixture(scope="module")
def gangs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Gang]]:
    folder = tmp_path_factory.mktemp("gangs")
    made = {size: Gang(size, folder / str(size)) for size in (1, 2)}
    yield made
    for gang in made.values():
        gang.end()


SMOOTH = {"record_gradients": True, "learning_rate": 2e-3}


class Runs:
    """Runs over the same pairs, each trained once."""

    def __init__(self, folder: Path, gangs: dict[int, Gang]):
        self.folder, self.gangs = folder, gangs
        self.model = small_model(folder / "model")
        pairs = random_pairs(32)
        self.pairs = {
            name: scored(pairs, self.model, dtype) * 3
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        }

    def of(self, dtype: str, workers: int, strategy: str = "ddp", **options: Any) -> Trained:
        folder = self.folder / f"{dtype}-{workers}-{strategy}-{'-'.join(options)}"
        if not folder.exists():
            self.gangs[workers].run(
                Model(path=str(self.model), dtype=dtype), self.pairs[dtype], folder, strategy=strategy,
                **{"checkpoint_every_steps": HALF, "schedule": "constant", **SMOOTH, **options},
            )  # fmt: skip
        return Trained(folder)


@pytest.fixture(scope="module")
def runs(gangs: dict[int, Gang], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), gangs)


def largest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_the_trajectory_is_near_that_of_float32_and_not_the_same(runs: Runs):
    exact, rounded = runs.of("float32", 1).losses, runs.of("bfloat16", 1).losses
    assert len(exact) == STEPS and exact[-1] < 0.95 * exact[0]
    assert 0 < largest(rounded, exact) < NEAR


@pytest.mark.parametrize(("workers", "strategy"), [(2, "ddp"), (2, "fsdp"), (1, "fsdp")])
def test_workers_and_wrapping_do_not_change_it(runs: Runs, workers: int, strategy: str):
    assert largest(runs.of("bfloat16", workers, strategy).losses, runs.of("bfloat16", 1).losses) < OTHER_ORDER


def test_activation_checkpointing_does_not_change_it(runs: Runs):
    assert runs.of("bfloat16", 1, activation_checkpointing=True).losses == runs.of("bfloat16", 1).losses


def test_policy_and_reference_agree_at_the_start(runs: Runs):
    assert runs.of("bfloat16", 1).losses[0] == pytest.approx(math.log(2), abs=OTHER_ORDER)


def test_a_reference_that_is_wrong_for_one_workers_pairs_stops_both(runs: Runs, tmp_path: Path):
    last = runs.pairs["bfloat16"][2]
    wrong = replace(last, chosen_ref_logprobs=[value - 1.0 for value in last.chosen_ref_logprobs or []])
    with pytest.raises(ReferenceMismatch, match="of 6 completions"):  # three pairs for two workers
        runs.gangs[2].run(
            Model(path=str(runs.model), dtype="bfloat16"), [*runs.pairs["bfloat16"][:2], wrong], tmp_path,
            global_batch_size=3,
        )  # fmt: skip


@pytest.mark.parametrize(("workers", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_weights_move_by_less_than_bfloat16_can_tell(runs: Runs, workers: int, strategy: str):
    trained = runs.of("bfloat16", workers, strategy, learning_rate=1e-7, record_gradients=False)
    before, after = load_file(runs.model / "model.safetensors"), trained.weights
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.float32
    moved = (after[name] - before[name]).abs()
    # AdamW moves a weight by about a learning rate a step: far under bfloat16's steps of these weights.
    assert STEPS * 1e-8 < moved.mean() < STEPS * 2e-7
    assert (after[name].bfloat16() == before[name].bfloat16()).float().mean() > 0.95


@pytest.mark.parametrize(("workers", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_adapters_train_beside_a_frozen_base(runs: Runs, tmp_path: Path, workers: int, strategy: str):
    policy = Model.model_validate({"path": str(runs.model), "dtype": "bfloat16", "lora": {"rank": 4}})
    runs.gangs[workers].run(
        policy, runs.pairs["bfloat16"], tmp_path, strategy=strategy, schedule="constant", learning_rate=3e-3
    )
    steps = sorted(tmp_path.glob("step-*"))
    losses = [m["loss"] for m in read_history(Location.of(steps[-1]))]
    assert losses[0] == pytest.approx(math.log(2), abs=OTHER_ORDER) and losses[-1] < 0.95 * losses[0]
    adapter = load_file(tmp_path / MODEL_FOLDER / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 and value.abs().max() > 0 for value in adapter.values())


@pytest.mark.parametrize(("workers", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_resumed_the_weights_are_the_same_bit_for_bit(runs: Runs, tmp_path: Path, workers: int, strategy: str):
    whole = runs.of("bfloat16", workers, strategy)
    assert whole.checkpoints == [HALF, STEPS]
    runs.gangs[workers].run(
        Model(path=str(runs.model), dtype="bfloat16"), runs.pairs["bfloat16"], tmp_path, strategy=strategy,
        checkpoint_every_steps=HALF, schedule="constant", resume=whole.last.with_name(f"step-{HALF}"), **SMOOTH,
    )  # fmt: skip
    resumed = Trained(tmp_path)
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.weights[name], value) for name, value in whole.weights.items())
