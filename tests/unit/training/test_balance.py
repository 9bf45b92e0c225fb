"""The balance of a mixture's experts over a global batch, in a step of the trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention import FAMILIES, micro_batch, saved
from dpo_ray.config import Train
from dpo_ray.errors import ConfigError
from dpo_ray.model.packing import pad
from dpo_ray.model.policy import CompletionScorer, load_policy
from dpo_ray.model.routing import balance_loss
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.balance import balance_coefficient
from dpo_ray.training.checkpoint import TrainState
from dpo_ray.training.parallel import Rank
from dpo_ray.training.step import Learner
from tests.gradients import require_same
from tests.rounding import GRADIENT, require_gradients
from tests.training import Gang, Trained, random_pairs, run, scored
from tests.unit.training.test_step import UNCLIPPED, Remembering, stepped

OLMOE = next(f for f in FAMILIES if f.architecture == "Olmoe")
COEFFICIENT = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(OLMOE, tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[TokenizedPair]:
    whole = [p for p in micro_batch() if p.chosen_ids and p.rejected_ids]
    return scored([*whole, replace(whole[0], pair_id="g", weight=2.0)], folder)


def learner(folder: Path, pairs: list[TokenizedPair], **values: Any) -> Learner:
    options = Train.model_validate({"global_batch_size": len(pairs), "max_grad_norm": UNCLIPPED, **values})
    policy = load_policy(folder)
    policy.set_experts_implementation("eager")
    scorer = CompletionScorer(policy).train()
    return Learner(
        scorer, scorer, Remembering(scorer.parameters(), lr=0.0), None, options, Rank(0, 1, torch.device("cpu")),
        TrainState(),
    )  # fmt: skip


@pytest.mark.parametrize("loss", [{"type": "sigmoid"}, {"type": "aot"}], ids=["sigmoid", "aot"])
@pytest.mark.parametrize("split", [[5], [2, 3], [1, 1, 1, 1, 1], [3, 0, 2]], ids=str)
def test_a_step_adds_the_balance_over_the_global_batch(
    folder: Path, pairs: list[TokenizedPair], loss: dict[str, Any], split: list[int]
):
    without = learner(folder, pairs, loss=loss)
    # Some pairs have weights, which the loss that couples pairs does not take.
    members = pairs if loss["type"] == "sigmoid" else [replace(p, weight=None) for p in pairs]
    plain, of_loss = stepped(without, [members])
    balance = balance_loss(*without.scorer(pad_of(without, members), with_routing=True).routing)
    (COEFFICIENT * balance).backward()
    whole = float(balance.detach())
    expected = [
        g + (0.0 if p.grad is None else p.grad) for g, p in zip(of_loss, without.scorer.parameters(), strict=True)
    ]
    # The balance is no small part of it.
    parts = torch.stack([(a - b).norm() for a, b in zip(expected, of_loss, strict=True)]).norm()
    assert parts > 1e-2 * torch.stack([g.norm() for g in of_loss]).norm()

    rest = iter(members)
    cut = [[next(rest) for _ in range(count)] for count in split]
    metrics, got = stepped(learner(folder, pairs, loss=loss, router_aux_loss=COEFFICIENT), cut)
    require_gradients(got, expected, of_all=True)
    assert metrics["aux_loss"] == pytest.approx(whole, rel=GRADIENT)
    assert metrics["loss"] == pytest.approx(plain["loss"], rel=GRADIENT)
    assert 0 <= metrics["experts/least_used"] <= 1 / 4 <= metrics["experts/most_used"] <= 1
    assert plain["aux_loss"] == pytest.approx(metrics["aux_loss"], rel=GRADIENT)  # told, though it counts nothing


def pad_of(made: Learner, members: list[TokenizedPair]) -> Any:
    """transformers' own layout and attention."""
    made.scorer.model.set_attn_implementation("sdpa")
    return pad(members)


@pytest.mark.parametrize(
    ("says", "asked", "expected"),
    [
        ({}, None, 0.0),
        ({"output_router_logits": True}, None, 0.02),
        ({"output_router_logits": True}, 0.0, 0.0),
        ({"output_router_logits": True}, 0.1, 0.1),
        ({}, 0.1, 0.1),
    ],
)
def test_the_model_s_own_coefficient_counts_where_its_configuration_turns_it_on(
    tmp_path: Path, says: dict[str, Any], asked: float | None, expected: float
):
    folder = saved(OLMOE, tmp_path, router_aux_loss_coef=0.02, **says)
    scorer = CompletionScorer(load_policy(folder))
    assert balance_coefficient(scorer, Train(router_aux_loss=asked)) == expected


def test_a_balance_of_no_experts_is_refused_at_the_start(small_model: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"train\.router_aux_loss=0\.1 is for mixtures of experts .* llama has none"):
        run(small_model, [], tmp_path, router_aux_loss=0.1, num_steps=1)
    assert not CompletionScorer(load_policy(small_model)).routes


def test_what_is_not_asked_for_leaves_a_training_known_by_what_it_was():
    assert "router_aux_loss" not in Train().identity()
    assert Train(router_aux_loss=0.1).identity()["router_aux_loss"] == 0.1


@pytest.fixture(scope="module")
def trajectory(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TokenizedPair], Trained]:
    place = tmp_path_factory.mktemp("one")
    many = scored(random_pairs(16, vocabulary=64), folder)
    run(folder, many, place, record_gradients=True, router_aux_loss=COEFFICIENT, tokens_per_microbatch=10_000)
    return many, Trained(place)


def test_two_workers_come_to_the_same(folder: Path, trajectory: tuple[list[TokenizedPair], Trained], tmp_path: Path):
    many, expected = trajectory
    gang = Gang(2, tmp_path / "store")
    try:
        for options in ({"strategy": "ddp"}, {"strategy": "fsdp", "activation_checkpointing": True}):
            place = tmp_path / options["strategy"]
            gang.run(folder, many, place, record_gradients=True, router_aux_loss=COEFFICIENT, **options)
            got = Trained(place)
            require_same(got.gradients, expected.gradients)
            for name in ("aux_loss", "experts/most_used", "experts/least_used"):
                assert got.of(name) == pytest.approx(expected.of(name), rel=1e-3)
    finally:
        gang.end()
