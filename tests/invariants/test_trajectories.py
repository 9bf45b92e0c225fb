"""The trajectory of a run does not depend on how it is laid out, nor on where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_ray.errors import NonFiniteLoss
from dpo_ray.pairs import TokenizedPair
from tests.gradients import require_same as require_same_gradients
from tests.invariants.trajectories import (
    BASELINE,
    BETA,
    COMPARED,
    HALF,
    LAYOUTS,
    LOGPROB,
    LOSS,
    LOSSES,
    STEPS,
    Layout,
    Trajectories,
    differences,
    read_reference,
    require_equal,
    require_same,
    require_same_weights,
    table,
)
from tests.training import Trained

FAULT = 1.0001
DDP, FSDP = Layout(2), Layout(2, {"strategy": "fsdp"})


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trajectories]:
    made = Trajectories(tmp_path_factory.mktemp("trajectories"))
    yield made
    made.end()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_trajectory_is_the_recorded_one(trajectories: Trajectories, loss: str):
    losses = trajectories.of(loss, BASELINE).losses
    assert len(losses) == STEPS
    assert losses[-1] < 0.92 * losses[0]
    require_equal(losses, read_reference()[loss], LOSS)


@pytest.mark.parametrize(("loss", "layout", "other"), COMPARED)
def test_the_layout_does_not_change_the_trajectory(trajectories: Trajectories, loss: str, layout: str, other: str):
    require_same(trajectories.of(loss, layout), trajectories.of(loss, other))


@pytest.mark.parametrize(("loss", "term"), [("kto", "kl"), ("bco_pair", "reward_mean")])
@pytest.mark.parametrize("layout", ["one worker, 8 micro-batches of 1", "2 workers, FSDP2"])
def test_what_a_loss_takes_from_all_pairs_is_the_same_and_is_not_nothing(
    trajectories: Trajectories, loss: str, term: str, layout: str
):
    expected = trajectories.of(loss, BASELINE).of(term)
    assert max(map(abs, expected)) > 1e-3
    require_equal(trajectories.of(loss, layout).of(term), expected, LOGPROB)


def test_sorting_over_the_whole_batch_is_not_the_loss_of_single_pairs(trajectories: Trajectories):
    # Otherwise a micro-batch could be sorted on its own, and nobody would see it.
    sorted_ones, single = (trajectories.of(loss, BASELINE).losses for loss in ("aot", "sigmoid"))
    assert differences(sorted_ones, single)[0] > 100 * LOSS


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
    require_same(resumed, trajectories.of("sigmoid", BASELINE))


@pytest.mark.parametrize("layout", [BASELINE, "2 workers, DDP", "2 workers, FSDP2"])
def test_resumed_by_as_many_workers_the_weights_are_the_same_bit_for_bit(trajectories: Trajectories, layout: str):
    uninterrupted = trajectories.of("sigmoid", layout)
    resumed = trajectories.of("sigmoid", layout, resumed_from=layout)
    assert uninterrupted.checkpoints == [HALF, STEPS] and resumed.checkpoints == [STEPS]
    assert resumed.losses == uninterrupted.losses
    assert resumed.weights.keys() == uninterrupted.weights.keys()
    assert all(torch.equal(resumed.weights[name], value) for name, value in uninterrupted.weights.items())


def averaged(trajectories: Trajectories, layout: Layout, folder: Path, **more: Any) -> Trained:
    """Four steps with an average of the weights and evaluations."""
    trajectories.train(
        layout, folder, trajectories.pairs[:32], held_out=trajectories.pairs[32:37], eval_every_steps=2,
        ema_decay=0.5, schedule="constant", warmup_fraction=0.0, **more,
    )  # fmt: skip
    return Trained(folder)


def with_bad_pairs(trajectories: Trajectories) -> list[TokenizedPair]:
    """Of three steps, with one in the second and one in the third."""
    pairs = trajectories.pairs[:24]
    for bad in (9, 17):
        count = len(pairs[bad].chosen_ids)
        pairs[bad] = replace(pairs[bad], chosen_ref_logprobs=[math.nan] * count)
    return pairs


def leaving_out(trajectories: Trajectories, layout: Layout, folder: Path, **more: Any) -> Trained:
    """Three steps of which the last two are left out."""
    trajectories.train(layout, folder, with_bad_pairs(trajectories), max_nonfinite_steps=2, **more)
    return Trained(folder)


@pytest.fixture(scope="module")
def by_one_worker(trajectories: Trajectories, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Trained]:
    return {way: way(trajectories, Layout(), tmp_path_factory.mktemp("one") / "run") for way in (averaged, leaving_out)}


@pytest.mark.parametrize("layout", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_the_weight_average_and_the_evaluations_are_the_same_on_workers(
    trajectories: Trajectories, by_one_worker: dict[Any, Trained], tmp_path: Path, layout: Layout
):
    one, two = by_one_worker[averaged], averaged(trajectories, layout, tmp_path)
    require_same(two, one)
    one_evaluated, two_evaluated = ([m["eval_loss"] for m in run.metrics if "eval_loss" in m] for run in (one, two))
    assert len(one_evaluated) == 2
    require_equal(two_evaluated, one_evaluated, LOSS)
    require_same_weights(two, one, load_file(trajectories.model / "model.safetensors"))


@pytest.mark.parametrize("layout", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_all_workers_leave_a_step_out_together_and_stop_together(
    trajectories: Trajectories, by_one_worker: dict[Any, Trained], tmp_path: Path, layout: Layout
):
    pairs = with_bad_pairs(trajectories)
    with pytest.raises(NonFiniteLoss, match="Step 3"):
        trajectories.train(layout, tmp_path / "stopped", pairs, max_nonfinite_steps=1)
    one, two = by_one_worker[leaving_out], leaving_out(trajectories, layout, tmp_path / "two")
    assert [sorted(m.get("skipped_pairs", [])) for m in two.metrics] == [
        [],
        sorted(p.pair_id for p in pairs[8:16]),
        sorted(p.pair_id for p in pairs[16:]),
    ]
    assert len(two.gradients) == 1
    require_same(two, one)
    require_same_weights(two, one, load_file(trajectories.model / "model.safetensors"))


@pytest.mark.parametrize("layout", [DDP, FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("way", [averaged, leaving_out])
def test_a_gradient_of_one_worker_that_is_a_ten_thousandth_too_large_is_seen(
    trajectories: Trajectories,
    by_one_worker: dict[Any, Trained],
    tmp_path: Path,
    way: Callable[..., Trained],
    layout: Layout,
):
    faulty = way(trajectories, layout, tmp_path, factor_of_rank_1=FAULT)
    with pytest.raises(AssertionError, match=r"gradient of .* in step"):
        require_same(faulty, by_one_worker[way])


@pytest.mark.parametrize(("loss", "layout", "other"), [c for c in COMPARED if LAYOUTS[c[1]].workers == 2])
def test_the_same_fault_is_seen_in_the_first_step_of_each_layout(
    trajectories: Trajectories, tmp_path: Path, loss: str, layout: str, other: str
):
    trajectories.train(
        LAYOUTS[layout], tmp_path, trajectories.pairs[:8], loss={"type": loss, "beta": BETA}, factor_of_rank_1=FAULT
    )
    with pytest.raises(AssertionError, match=r"gradient of .* in step 0"):
        require_same_gradients(Trained(tmp_path).gradients, trajectories.of(loss, other).gradients[:1])


def test_the_table_has_a_line_for_each_comparison(trajectories: Trajectories):
    printed = table(trajectories)
    print(f"\n{printed}")
    assert len(printed.splitlines()) == 2 + len(COMPARED) + len(LOSSES)
    assert all(layout in printed for layout in LAYOUTS)
