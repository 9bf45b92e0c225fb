"""One optimizer step: what is summed over micro-batches is the gradient of the loss over the whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_ray.config import Train
from dpo_ray.model.attention import IMPLEMENTATION
from dpo_ray.model.policy import CompletionScorer, load_policy
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.batch import Share
from dpo_ray.training.checkpoint import TrainState
from dpo_ray.training.parallel import Rank
from dpo_ray.training.step import Learner, StepResult
from tests.rounding import GRADIENT, of_logprob, of_sum, require_gradients, ulps
from tests.training import random_pairs, scored

BATCH = 6
UNCLIPPED = 1e6
NEAR = 0.5 * of_sum(16, 512)  # a loss moves by at most β of a pair's log-probs, of which there are at most 16


class Remembering(torch.optim.SGD):
    """Keeps the gradients that a step was made of, and with a rate of 0 changes nothing."""

    gradients: list[Tensor] | None = None

    def step(self, closure: Any = None) -> Any:
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


@pytest.fixture(scope="module")
def pairs(small_model: Path) -> list[TokenizedPair]:
    """Pairs whose stored reference is another model's, so that log-ratios are far from 0 and of either sign."""
    random = torch.Generator().manual_seed(3)

    def moved(values: list[float] | None) -> list[float]:
        assert values is not None
        return [v + float(torch.randn((), generator=random)) for v in values]

    return [
        replace(
            p,
            chosen_ref_logprobs=moved(p.chosen_ref_logprobs),
            rejected_ref_logprobs=moved(p.rejected_ref_logprobs),
            mismatched_ref_logprobs=[v - 1.0 for v in p.mismatched_ref_logprobs or []],
        )
        for p in scored(random_pairs(BATCH), small_model)
    ]


def learner_of(model: Path, loss: dict[str, Any], **values: Any) -> Learner:
    options = Train.model_validate(
        {"loss": loss, "global_batch_size": BATCH, "max_grad_norm": UNCLIPPED, **values}
    )  # fmt: skip
    scorer = CompletionScorer(load_policy(model)).train()
    optimizer = Remembering(scorer.parameters(), lr=0.0)
    me = Rank(0, 1, torch.device("cpu"))
    return Learner(scorer, scorer, optimizer, None, options, me, TrainState())


def stepped(learner: Learner, microbatches: list[list[TokenizedPair]]) -> tuple[dict[str, float], list[Tensor]]:
    shortest = min((p for pairs in microbatches for p in pairs), key=lambda p: p.num_tokens)
    result = learner.step(Share(microbatches, filler=shortest), 0.0, None)
    assert not result.skipped
    assert isinstance(learner.optimizer, Remembering) and learner.optimizer.gradients is not None
    assert all(p.grad is None for p in learner.scorer.parameters())
    return result.metrics, learner.optimizer.gradients


def tokens_of(pair: TokenizedPair) -> int:
    """As the field counts them: the prompt once for each completion."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def completion_logprobs(learner: Learner, pairs: Sequence[TokenizedPair]) -> list[tuple[Tensor, Tensor]]:
    """log π of chosen and rejected, pair by pair, with gradient: no packing, no sums by index."""
    found = []
    for pair in pairs:
        values = learner.scorer(learner.scorer.collate([pair])).logprobs
        cut = len(pair.chosen_ids)
        found.append((values[:cut], values[cut:]))
    return found


def reference_of(pairs: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor]:
    chosen = torch.tensor([math.fsum(p.chosen_ref_logprobs or []) for p in pairs])
    return chosen, torch.tensor([math.fsum(p.rejected_ref_logprobs or []) for p in pairs])


def direct(learner: Learner, pairs: Sequence[TokenizedPair], kind: str) -> Tensor:
    """The loss of the whole batch from its formula, β = 0.5."""
    tokens = completion_logprobs(learner, pairs)
    chosen, rejected = (torch.stack([pair[side].sum() for pair in tokens]) for side in (0, 1))
    ref_chosen, ref_rejected = reference_of(pairs)
    nll = -torch.stack([pair[0].mean() for pair in tokens]).mean()
    if kind == "aot":
        margins = (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values
    elif kind == "aot_unpaired":
        margins = (chosen - ref_chosen).sort().values - (rejected - ref_rejected).sort().values
    else:
        margins = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -logsigmoid(0.5 * margins).mean() + 0.25 * nll


SPLITS = {"whole": [6], "two": [2, 4], "six": [1] * 6, "with empty ones": [3, 0, 3, 0]}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("kind", ["sigmoid", "aot", "aot_unpaired"])
def test_loss_and_gradient_are_those_of_the_formula_over_the_whole_batch(
    small_model: Path, pairs: list[TokenizedPair], kind: str, split: list[int]
):
    learner = learner_of(small_model, {"type": kind, "beta": 0.5, "nll_weight": 0.25})
    ends = [sum(split[: i + 1]) for i in range(len(split))]
    cut = [pairs[end - size : end] for size, end in zip(split, ends, strict=True)]
    metrics, gradients = stepped(learner, cut)
    expected = direct(learner, pairs, kind)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=NEAR)
    by_formula = torch.autograd.grad(expected, list(learner.scorer.parameters()))
    require_gradients(gradients, by_formula)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in by_formula))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=GRADIENT)


def test_the_three_losses_differ_on_these_pairs(small_model: Path, pairs: list[TokenizedPair]):
    learner = learner_of(small_model, {"type": "sigmoid"})
    with torch.no_grad():
        values = [direct(learner, pairs, kind).item() for kind in ("sigmoid", "aot", "aot_unpaired")]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-3


@pytest.mark.parametrize("split", [[6], [1] * 6], ids=["whole", "six"])
def test_kto_takes_its_zero_from_all_pairs_and_sends_no_gradient_through_it(
    small_model: Path, pairs: list[TokenizedPair], split: list[int]
):
    learner = learner_of(small_model, {"type": "kto", "beta": 0.5, "desirable_weight": 2.0})
    ends = [sum(split[: i + 1]) for i in range(len(split))]
    metrics, gradients = stepped(learner, [pairs[end - size : end] for size, end in zip(split, ends, strict=True)])
    # The model is still the one whose mismatched log-probs were stored, each token's lowered by 1.
    zero = sum(len(p.mismatched_ids or []) for p in pairs) / BATCH
    assert metrics["kl"] == pytest.approx(zero, abs=8 * of_logprob(512))
    tokens = completion_logprobs(learner, pairs)
    chosen, rejected = (torch.stack([pair[side].sum() for pair in tokens]) for side in (0, 1))
    ref_chosen, ref_rejected = reference_of(pairs)
    wins = 2.0 * torch.sigmoid(0.5 * (zero - (chosen - ref_chosen)))
    losses = torch.sigmoid(0.5 * ((rejected - ref_rejected) - zero))
    expected = ((wins + losses) / 2).mean()
    assert metrics["loss"] == pytest.approx(expected.item(), abs=NEAR)
    require_gradients(gradients, torch.autograd.grad(expected, list(learner.scorer.parameters())))


def test_an_empty_microbatch_runs_the_model_all_the_same(small_model: Path, pairs: list[TokenizedPair]):
    # Under FSDP every rank takes part in gathering weights, once a micro-batch.
    learner = learner_of(small_model, {"type": "sigmoid"})
    calls = []
    learner.scorer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    stepped(learner, [pairs, [], []])
    assert calls == [True, True, True]


def test_gradients_are_clipped_to_their_norm_and_the_norm_before_is_told(small_model: Path, pairs: list[TokenizedPair]):
    free, whole = stepped(learner_of(small_model, {"type": "sigmoid"}), [pairs])
    clipped, short = stepped(learner_of(small_model, {"type": "sigmoid"}, max_grad_norm=0.01), [pairs])
    assert clipped["grad_norm"] == free["grad_norm"] > 0.1
    require_gradients(short, [before * (0.01 / free["grad_norm"]) for before in whole])


def test_the_rate_of_the_step_is_the_one_it_is_given(small_model: Path, pairs: list[TokenizedPair]):
    learner = learner_of(small_model, {"type": "sigmoid"})
    before = [p.detach().clone() for p in learner.scorer.parameters()]
    learner.step(Share([pairs], filler=pairs[0]), 0.5, None)
    assert isinstance(learner.optimizer, Remembering) and learner.optimizer.gradients is not None
    for old, new, gradient in zip(before, learner.scorer.parameters(), learner.optimizer.gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - 0.5 * gradient, rtol=0, atol=ulps(2, 1))


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_are(small_model: Path, pairs: list[TokenizedPair]):
    learner = learner_of(small_model, {"type": "sigmoid"})
    weight = learner.scorer.model.model.norm.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = weight.detach().clone()
    result = learner.step(Share([pairs[:2], pairs[2:]], filler=pairs[0]), 0.5, None)
    ids = [p.pair_id for p in pairs]
    assert result == StepResult(sum(map(tokens_of, pairs)), skipped_pairs=tuple(ids))
    assert result.skipped
    assert result.record() == {"skipped_pairs": ids, "num_tokens": result.num_tokens}
    assert torch.equal(weight, before)
    assert all(p.grad is None for p in learner.scorer.parameters())


def test_reward_sums_count_each_completion_once_and_not_those_of_skipped_steps(
    small_model: Path, pairs: list[TokenizedPair]
):
    learner = learner_of(small_model, {"type": "bco_pair", "beta": 0.5})
    metrics, _ = stepped(learner, [pairs[:4], pairs[4:]])
    assert metrics["reward_mean"] == 0.0
    assert learner.state.reward_count == 2 * BATCH
    total = BATCH * (metrics["rewards/chosen"] + metrics["rewards/rejected"])
    assert learner.state.reward_sum == pytest.approx(total, abs=1e-6)
    assert abs(total) > 0.1
    bad = replace(pairs[0], chosen_ref_logprobs=[math.nan] * len(pairs[0].chosen_ids))
    assert learner.step(Share([[bad, *pairs[1:]]], filler=pairs[0]), 0.0, None).skipped
    assert learner.state.reward_count == 2 * BATCH
    metrics, _ = stepped(learner, [pairs])
    assert metrics["reward_mean"] == pytest.approx(total / (2 * BATCH), abs=1e-6)


def test_evaluation_leaves_the_module_in_training_and_without_gradients(small_model: Path, pairs: list[TokenizedPair]):
    learner = learner_of(small_model, {"type": "sigmoid", "beta": 0.5})
    found = learner.evaluate(Share([pairs[:2], [], pairs[2:]], filler=pairs[0]))
    with torch.no_grad():
        expected = (
            direct(learner, pairs, "sigmoid")
            + 0.25 * torch.stack([chosen.mean() for chosen, _ in completion_logprobs(learner, pairs)]).mean()
        )  # without its NLL term
    assert found["eval_loss"] == pytest.approx(expected.item(), abs=NEAR)
    assert learner.scorer.training
    assert all(p.grad is None for p in learner.scorer.parameters())


MASKED_LOSSES = [
    {"type": "sigmoid", "beta": 0.5},
    {"type": "simpo", "beta": 0.5, "target_margin": 0.125},
    {"type": "sigmoid", "beta": 0.5, "nll_weight": 0.25},
]


@pytest.mark.parametrize("options", MASKED_LOSSES, ids=["sigmoid", "per token", "nll"])
def test_of_answers_in_turns_only_the_assistants_tokens_are_summed_and_counted(
    small_model: Path, options: dict[str, Any]
):
    random = torch.Generator().manual_seed(5)

    def mask(ids: list[int]) -> list[bool]:
        return [True, *(torch.rand(len(ids) - 1, generator=random) < 0.5).tolist()]

    made = [replace(p, chosen_mask=mask(p.chosen_ids), rejected_mask=mask(p.rejected_ids)) for p in random_pairs(BATCH)]
    pairs = [
        replace(
            p,
            chosen_ref_logprobs=[-1.0] * sum(p.chosen_mask or []),
            rejected_ref_logprobs=[-2.0] * sum(p.rejected_mask or []),
        )
        for p in made
    ]
    learner = learner_of(small_model, options)
    learner.scorer.model.set_attn_implementation("sdpa")  # each sequence alone
    losses, weight = [], options.get("nll_weight", 0.0)
    for pair in pairs:
        logps, means = [], []
        for ids, which in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask)):
            logits = learner.scorer.model(torch.tensor([pair.prompt_ids + ids])).logits[0]
            of_token = logits[len(pair.prompt_ids) - 1 : -1].log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
            spoken = [value for value, bears in zip(of_token, which or [], strict=True) if bears]
            logps.append(sum(spoken, torch.tensor(0.0)))
            means.append(logps[-1] / len(spoken))
        if options["type"] == "simpo":
            losses.append(-logsigmoid(0.5 * (means[0] - means[1]) - 0.125))
        else:
            reference = [math.fsum(side or []) for side in (pair.chosen_ref_logprobs, pair.rejected_ref_logprobs)]
            margin = logps[0] - logps[1] - reference[0] + reference[1]
            losses.append(-logsigmoid(0.5 * margin) - weight * means[0])
    expected = torch.stack(losses).mean()
    by_hand = torch.autograd.grad(expected, list(learner.scorer.parameters()))
    learner.scorer.model.set_attn_implementation(IMPLEMENTATION)
    metrics, gradients = stepped(learner, [pairs[:2], pairs[2:]])
    assert metrics["loss"] == pytest.approx(expected.item(), abs=NEAR)
    require_gradients(gradients, by_hand)
