"""Training on a mixture, killed and resumed: it ends in the bytes of one that was not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.batch import Step
from dpo_ray.training.index import PlanIndex
from dpo_ray.training.mixture import by_source
from dpo_ray.training.parallel import Rank
from dpo_ray.training.plan import StepPlan
from tests.training import Trained, random_pairs, run, scored, shares

WEIGHTS = {"math": 0.5, "chat": 0.3, "safety": 0.2}
SIZES = {"math": 12, "chat": 30, "safety": 8}
BATCH = 10
ME = Rank(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def pairs(small_model: Path) -> list[TokenizedPair]:
    """Source after source; some weigh more than others."""
    sources = [name for name, size in SIZES.items() for _ in range(size)]
    plain = scored(random_pairs(len(sources)), small_model)
    return [
        replace(pair, source=source, weight=2.0 if number % 5 == 0 else None)
        for number, (pair, source) in enumerate(zip(plain, sources, strict=True))
    ]


def plan_of(pairs: Sequence[TokenizedPair]) -> StepPlan:
    lengths = [[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in pairs]
    index = PlanIndex.of(
        list(SIZES),
        np.cumsum([0, *SIZES.values()]),
        np.concatenate([np.arange(size, dtype=np.int32) for size in SIZES.values()]),
        np.array(lengths, dtype=np.int32),
        len(pairs),
        source=np.arange(len(SIZES), dtype=np.int16),
        sources=list(SIZES),
    )
    return StepPlan(index, BATCH, 2, 0, 64, WEIGHTS)


def feed(pairs: Sequence[TokenizedPair]) -> Callable[[int], Iterator[Step]]:
    plan = plan_of(pairs)
    return lambda start: (
        Step(number, shares([pairs[row] for row in rows], ME, 64)) for number, rows in plan.steps(start)
    )


def trained(model: Path, pairs: Sequence[TokenizedPair], folder: Path, **options: object) -> Trained:
    steps = plan_of(pairs).num_steps
    same = {"global_batch_size": BATCH, "checkpoint_every_steps": 3, "num_steps": steps, "sources": tuple(SIZES)}
    run(model, pairs, folder, steps_from=feed(pairs), **same, **options)
    return Trained(folder)


@pytest.fixture(scope="module")
def uninterrupted(small_model: Path, pairs: list[TokenizedPair], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(small_model, pairs, tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("killed_after", [3, 6, 9])
def test_killed_and_resumed_it_ends_in_the_same_bytes(
    small_model: Path, pairs: list[TokenizedPair], uninterrupted: Trained, tmp_path: Path, killed_after: int
):
    with pytest.raises(InterruptedError):
        trained(small_model, pairs, tmp_path, die_at=killed_after)
    resumed = trained(small_model, pairs, tmp_path, resume=tmp_path / f"step-{killed_after}")
    name = "model.safetensors"
    assert (resumed.model / name).read_bytes() == (uninterrupted.model / name).read_bytes()
    both = [
        [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in t.metrics] for t in (resumed, uninterrupted)
    ]
    assert both[0] == both[1]


def test_each_step_has_its_shares_and_metrics_are_told_by_source(uninterrupted: Trained):
    assert len(uninterrupted.metrics) == 10
    for metrics in uninterrupted.metrics:
        assert [metrics[f"sources/{name}/pairs"] for name in SIZES] == [5, 3, 2]
        assert all(f"sources/{name}/rewards/accuracies" in metrics for name in SIZES)
    losses = [m["sources/math/loss"] for m in uninterrupted.metrics]
    assert losses[-1] < losses[0]  # each of its pairs came four times


def test_the_summary_tells_the_last_epoch_by_source(pairs: list[TokenizedPair], uninterrupted: Trained):
    told = by_source(plan_of(pairs).trained(), uninterrupted.metrics)
    assert told["math"]["passes"] == pytest.approx(50 / 12) and told["math"]["share"] == 0.5
    last = [m["sources/math/loss"] for m in uninterrupted.metrics[5:]]
    assert told["math"]["loss"] == pytest.approx(sum(last) / 5)
