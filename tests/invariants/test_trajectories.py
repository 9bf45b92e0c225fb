"""The trajectory of a run does not depend on how it is laid out, nor on where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpo_ray.errors import NonFiniteLoss
from tests.invariants.trajectories import (
    BASELINE,
    COMPARED,
    HALF,
    LAYOUTS,
    LOSSES,
    STEPS,
    Layout,
    Trajectories,
    differences,
    read_reference,
    table,
)
from tests.training import Trained

LARGEST, MEAN = 5e-7, 1e-7  # measured: below 1e-7 and 3e-8 in float32, a last bit of a loss near 1
WEIGHTS = 1e-5  # a hundredth of a step of AdamW, which makes whole steps of gradients that are all but 0
OTHER_MACHINES = 1e-4  # reference.json was recorded on one CPU; another one rounds otherwise
DDP, FSDP = Layout(2), Layout(2, {"strategy": "fsdp"})


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trajectories]:
    made = Trajectories(tmp_path_factory.mktemp("trajectories"))
    yield made
    made.end()


def require_equal(got: list[float], expected: list[float]) -> None:
    largest, mean = differences(got, expected)
    assert largest <= LARGEST and mean <= MEAN, f"largest |Δloss| {largest:.2g}, mean {mean:.2g}"


@pytest.mark.parametrize("loss", LOSSES)
def test_the_trajectory_is_the_recorded_one(trajectories: Trajectories, loss: str):
    losses = trajectories.of(loss, BASELINE).losses
    assert len(losses) == STEPS
    assert losses[-1] < 0.92 * losses[0]
    assert differences(losses, read_reference()[loss])[0] <= OTHER_MACHINES


@pytest.mark.parametrize(("loss", "layout", "other"), COMPARED)
def test_the_layout_does_not_change_the_trajectory(trajectories: Trajectories, loss: str, layout: str, other: str):
    require_equal(trajectories.of(loss, layout).losses, trajectories.of(loss, other).losses)


@pytest.mark.parametrize(("loss", "term"), [("kto", "kl"), ("bco_pair", "reward_mean")])
@pytest.mark.parametrize("layout", ["one worker, 8 micro-batches of 1", "2 workers, FSDP2"])
def test_what_a_loss_takes_from_all_pairs_is_the_same_and_is_not_nothing(
    trajectories: Trajectories, loss: str, term: str, layout: str
):
    expected = trajectories.of(loss, BASELINE).of(term)
    assert max(map(abs, expected)) > 1e-3
    assert trajectories.of(loss, layout).of(term) == pytest.approx(expected, abs=1e-6)


def test_sorting_over_the_whole_batch_is_not_the_loss_of_single_pairs(trajectories: Trajectories):
    # Otherwise a micro-batch could be sorted on its own, and nobody would see it.
    sorted_ones, single = (trajectories.of(loss, BASELINE).losses for loss in ("aot", "sigmoid"))
    assert differences(sorted_ones, single)[0] > 100 * LARGEST


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (BASELINE, "2 workers, DDP"),
        (BASELINE, "2 workers, FSDP2"),
        ("2 workers, DDP", "2 workers, FSDP2"),
        ("2 workers, FSDP2", BASELINE),
    ],
)
def test_a_checkpoint_is_resumed_by_another_number_of_workers_and_another_wrapping(
    trajectories: Trajectories, written: str, read: str
):
    resumed = trajectories.of("sigmoid", read, resumed_from=written)
    assert resumed.checkpoints == [STEPS]
    require_equal(resumed.losses, trajectories.of("sigmoid", BASELINE).losses)


@pytest.mark.parametrize("layout", [BASELINE, "2 workers, DDP", "2 workers, FSDP2"])
def test_resumed_by_as_many_workers_the_weights_are_the_same_bit_for_bit(trajectories: Trajectories, layout: str):
    uninterrupted = trajectories.of("sigmoid", layout)
    resumed = trajectories.of("sigmoid", layout, resumed_from=layout)
    assert uninterrupted.checkpoints == [HALF, STEPS] and resumed.checkpoints == [STEPS]
    assert resumed.losses == uninterrupted.losses
    assert resumed.weights.keys() == uninterrupted.weights.keys()
    assert all(torch.equal(resumed.weights[name], value) for name, value in uninterrupted.weights.items())


@pytest.mark.parametrize("layout", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_the_weight_average_and_the_evaluations_are_the_same_on_workers(
    trajectories: Trajectories, tmp_path: Path, layout: Layout
):
    found = []
    for name, where in (("one", Layout()), ("two", layout)):
        trajectories.train(
            where, tmp_path / name, trajectories.pairs[:32], held_out=trajectories.pairs[32:37], eval_every_steps=2,
            ema_decay=0.5, schedule="constant", warmup_fraction=0.0,
        )  # fmt: skip
        found.append(Trained(tmp_path / name))
    one, two = found
    assert two.losses == pytest.approx(one.losses, abs=LARGEST)
    evaluated = [[m["eval_loss"] for m in run.metrics if "eval_loss" in m] for run in found]
    assert len(evaluated[0]) == 2
    assert evaluated[1] == pytest.approx(evaluated[0], abs=LARGEST)
    for name, value in one.weights.items():
        torch.testing.assert_close(two.weights[name], value, rtol=0, atol=WEIGHTS)


@pytest.mark.parametrize("layout", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_all_workers_leave_a_step_out_together_and_stop_together(
    trajectories: Trajectories, tmp_path: Path, layout: Layout
):
    pairs = trajectories.pairs[:24]
    for bad in (9, 17):
        count = len(pairs[bad].chosen_ids)
        pairs[bad] = replace(pairs[bad], chosen_ref_logprobs=[math.nan] * count)
    with pytest.raises(NonFiniteLoss, match="Step 3"):
        trajectories.train(layout, tmp_path / "stopped", pairs, max_nonfinite_steps=1)
    found = []
    for name, where in (("one", Layout()), ("two", layout)):
        trajectories.train(where, tmp_path / name, pairs, max_nonfinite_steps=2)
        found.append(Trained(tmp_path / name))
    one, two = found
    assert [sorted(m.get("skipped_pairs", [])) for m in two.metrics] == [
        [],
        sorted(p.pair_id for p in pairs[8:16]),
        sorted(p.pair_id for p in pairs[16:]),
    ]
    for name, value in one.weights.items():
        torch.testing.assert_close(two.weights[name], value, rtol=0, atol=WEIGHTS)


def test_the_table_has_a_line_for_each_comparison(trajectories: Trajectories):
    printed = table(trajectories)
    print(f"\n{printed}")
    assert len(printed.splitlines()) == 2 + len(COMPARED) + len(LOSSES)
    assert all(layout in printed for layout in LAYOUTS)
