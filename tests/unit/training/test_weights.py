"""A pair of weight 2 is the pair twice: in loss, gradient and metrics, however the batch is cut and spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_ray.config import Train
from dpo_ray.model.policy import CompletionScorer, load_policy
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.batch import Share, batch_weight
from dpo_ray.training.checkpoint import TrainState
from dpo_ray.training.parallel import Rank
from dpo_ray.training.step import Learner
from tests.ranks import Ranks
from tests.rounding import of_sum, require_gradients
from tests.training import one_thread, shares
from tests.unit.training.test_step import Remembering, pairs

__all__ = ["pairs"]
NEAR = 2 * of_sum(16, 512)

LOSSES: list[dict[str, Any]] = [
    {"type": "sigmoid", "beta": 0.5, "nll_weight": 0.25},
    {"type": "sigmoid", "wpo": True},
    {"type": "ipo", "beta": 0.5},
    {"type": "hinge", "beta": 0.5},
    {"type": "bco_pair", "beta": 0.5},
    {"type": "kto", "beta": 0.5, "desirable_weight": 2.0},
    {"type": "simpo"},
    {"type": "orpo"},
    {"type": "weighted", "terms": [{"weight": 1, "loss": {"type": "sigmoid"}}, {"weight": 2, "loss": {"type": "ipo"}}]},
]


def id_of(value: Any) -> str:
    return value["type"] + "-wpo" * value.get("wpo", False) if isinstance(value, dict) else str(value)


class Stepped:
    """What a step over a batch came to, on so many ranks."""

    def __init__(self, model: Path, loss: dict[str, Any], batch: Sequence[TokenizedPair], world_size: int, tokens: int):
        options = Train.model_validate({"loss": loss, "global_batch_size": len(batch), "max_grad_norm": 1e6})
        ranks = Ranks(world_size)
        self.learners = {me.rank: learner_of(model, options, me) for me in ranks.all}

        def work(me: Rank) -> tuple[dict[str, float], list[Tensor]]:
            learner = self.learners[me.rank]
            result = learner.step(shares(batch, me, tokens), 0.0, None)
            assert isinstance(learner.optimizer, Remembering) and learner.optimizer.gradients is not None
            return result.metrics, learner.optimizer.gradients

        with one_thread():
            found = ranks.run(work)
        [self.metrics, *others] = [metrics for metrics, _ in found]
        assert all(without_norm(metrics) == without_norm(self.metrics) for metrics in others)
        # As DistributedDataParallel does.
        self.gradients = [torch.stack(of_ranks).mean(0) for of_ranks in zip(*(g for _, g in found), strict=True)]


def learner_of(model: Path, options: Train, me: Rank) -> Learner:
    scorer = CompletionScorer(load_policy(model)).train()
    optimizer = Remembering(scorer.parameters(), lr=0.0)
    return Learner(scorer, scorer, optimizer, None, options, me, TrainState(), ("a", "b"))


def without_norm(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "grad_norm"}


def require_same(weighted: Stepped, repeated: Stepped) -> None:
    require_gradients(weighted.gradients, repeated.gradients)
    expected = without_norm(repeated.metrics)
    found = without_norm(weighted.metrics)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if not name.endswith("/pairs"):
            assert value == pytest.approx(expected[name], abs=NEAR), name
    for learner in weighted.learners.values():
        assert learner.state.reward_sum == pytest.approx(repeated.learners[0].state.reward_sum, abs=16 * NEAR)
        assert learner.state.reward_count == repeated.learners[0].state.reward_count


def weighing(batch: Sequence[TokenizedPair], *weights: float) -> list[TokenizedPair]:
    return [replace(pair, weight=weight) for pair, weight in zip(batch, weights, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("loss", LOSSES, ids=id_of)
def test_weights_2_1_1_are_the_first_pair_twice(
    small_model: Path, pairs: list[TokenizedPair], loss: dict[str, Any], world_size: int
):
    three = [replace(pair, source=source) for pair, source in zip(pairs[:3], "aba", strict=True)]
    weighted = Stepped(small_model, loss, weighing(three, 2, 1, 1), world_size, tokens=32)
    require_same(weighted, Stepped(small_model, loss, [three[0], *three], 1, tokens=1000))


@pytest.mark.parametrize("tokens", [1, 40, 1000], ids=lambda tokens: f"microbatches of {tokens} tokens")
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_so_they_are_on_any_number_of_ranks_in_micro_batches_of_any_size(
    small_model: Path, pairs: list[TokenizedPair], world_size: int, tokens: int
):
    batch = [*pairs, *(replace(pair, pair_id=f"more-{pair.pair_id}") for pair in pairs[:2])]
    weights = (1, 3, 1, 2, 1, 1, 1, 2)
    repeated = [pair for pair, count in zip(batch, weights, strict=True) for _ in range(count)]
    loss = LOSSES[0]
    weighted = Stepped(small_model, loss, weighing(batch, *weights), world_size, tokens)
    require_same(weighted, Stepped(small_model, loss, repeated, 1, tokens=1000))


def test_only_the_proportions_of_weights_count(small_model: Path, pairs: list[TokenizedPair]):
    small, large = (
        Stepped(small_model, LOSSES[0], weighing(pairs[:3], *(factor * w for w in (2, 1, 1))), 1, 1000)
        for factor in (0.25, 64)
    )
    require_gradients(small.gradients, large.gradients)
    assert small.metrics["loss"] == pytest.approx(large.metrics["loss"], abs=NEAR)


@pytest.mark.parametrize("loss", LOSSES, ids=id_of)
def test_a_weight_of_1_changes_no_bit(small_model: Path, pairs: list[TokenizedPair], loss: dict[str, Any]):
    plain, ones = (Stepped(small_model, loss, batch, 1, 40) for batch in (pairs, weighing(pairs, *[1] * len(pairs))))
    assert plain.metrics == ones.metrics
    assert all(torch.equal(a, b) for a, b in zip(plain.gradients, ones.gradients, strict=True))


def test_metrics_are_told_by_source(small_model: Path, pairs: list[TokenizedPair]):
    of = [replace(pair, source=source) for pair, source in zip(pairs, "aabbb", strict=False)]
    batch = [*of, replace(pairs[5], source=None)]
    found = Stepped(small_model, LOSSES[0], batch, 2, 40).metrics
    alone = [Stepped(small_model, LOSSES[0], [p for p in of if p.source == name], 1, 1000).metrics for name in "ab"]
    for name, metrics, count in zip("ab", alone, (2, 3), strict=True):
        assert found[f"sources/{name}/pairs"] == count
        for metric in ("loss", "rewards/accuracies", "rewards/margins"):
            assert found[f"sources/{name}/{metric}"] == pytest.approx(metrics[metric], abs=NEAR)
    evaluated = Stepped(small_model, LOSSES[0], batch, 1, 40).learners[0].evaluate(Share([batch], batch[0]))
    assert evaluated["eval_sources/a/loss"] == pytest.approx(found["sources/a/loss"], abs=NEAR)
    none = Stepped(small_model, LOSSES[0], [p for p in of if p.source == "a"], 1, 1000).metrics
    assert "sources/a/loss" in none and not any(name.startswith("sources/b") for name in none)


def test_held_out_pairs_count_once_each_but_in_their_loss(small_model: Path, pairs: list[TokenizedPair]):
    def evaluated(batch: Sequence[TokenizedPair]) -> dict[str, float]:
        options = Train.model_validate({"loss": LOSSES[0], "global_batch_size": len(batch)})
        return learner_of(small_model, options, Ranks(1).all[0]).evaluate(Share([list(batch)], batch[0]))

    plain, weighted = evaluated(pairs[:3]), evaluated(weighing(pairs[:3], 2, 1, 1))
    twice = evaluated([pairs[0], *pairs[:3]])
    assert weighted["eval_loss"] == pytest.approx(twice["eval_loss"], abs=NEAR) != plain["eval_loss"]
    same = [name for name in plain if name != "eval_loss"]
    assert {name: weighted[name] for name in same} == {name: plain[name] for name in same}
    assert twice["eval_rewards/accuracies"] != plain["eval_rewards/accuracies"]


def test_a_tie_is_neither_right_nor_wrong(small_model: Path, pairs: list[TokenizedPair]):
    tie = replace(pairs[0], preference=0.5)
    with_tie, without = (Stepped(small_model, LOSSES[0], batch, 1, 1000) for batch in ([tie, *pairs[1:]], pairs[1:]))
    name = "rewards/accuracies"
    assert with_tie.metrics[name] == pytest.approx(without.metrics[name], abs=NEAR)
    assert "rewards/accuracies" not in Stepped(small_model, LOSSES[0], [tie], 1, 1000).metrics


def test_margins_and_preferences_of_the_pairs_reach_the_loss(small_model: Path, pairs: list[TokenizedPair]):
    options = {"type": "sigmoid", "beta": 0.5}
    plain = Stepped(small_model, options, pairs[:2], 1, 1000).metrics
    certain, soft = replace(pairs[0], margin=0.7), replace(pairs[1], preference=0.8)
    found = Stepped(small_model, options, [certain, soft], 2, 1).metrics
    h = [
        Stepped(small_model, options, [pair], 1, 1000).metrics["rewards/margins"] for pair in pairs[:2]
    ]  # β times the margin
    first = -torch.nn.functional.logsigmoid(torch.tensor(h[0] - 0.7))
    second = -torch.nn.functional.logsigmoid(torch.tensor(h[1])) + 0.2 * h[1]
    assert found["loss"] == pytest.approx(float(first + second) / 2, abs=NEAR)
    assert found["rewards/margins"] == pytest.approx(plain["rewards/margins"], abs=NEAR)


def test_the_weight_of_a_batch_does_not_depend_on_the_order_of_its_pairs():
    weights = [0.1, None, 1e-9, 3.0, 0.2]
    assert batch_weight(weights) == batch_weight(weights[::-1]) == 4.300000001
