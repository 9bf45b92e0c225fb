"""The training loop on a tiny model, fed from memory, in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from dpo_ray.config import LoRA, Model, Train
from dpo_ray.config.tolerance import Tolerance
from dpo_ray.errors import DataError, NonFiniteLoss, ReferenceMismatch
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.files import SKIPPED
from dpo_ray.training.optim import learning_rate
from tests.gradients import require_same
from tests.rounding import GRADIENT, of_logprob, of_sum, ulps
from tests.training import Kept, Trained, random_pairs, run, scored

BATCH, NUM_STEPS = 8, 4
OF_COMPLETION = 8 * of_logprob(512)  # of at most 8 tokens, were they all off to one side
OF_PAIR = of_sum(16, 512)  # at most; times its slope it moves a loss or a reward
STEADY = {"schedule": "constant", "warmup_fraction": 0.0}


@pytest.fixture(scope="module")
def pairs(small_model: Path) -> list[TokenizedPair]:
    """Pairs of random tokens, with reference log-probs from the trainer's own forward at its start."""
    return scored(random_pairs(BATCH * NUM_STEPS), small_model)


@pytest.fixture(scope="module")
def held_out(small_model: Path) -> list[TokenizedPair]:
    return scored(random_pairs(5, seed=7), small_model)


@pytest.fixture(scope="module")
def uninterrupted(small_model: Path, pairs: list[TokenizedPair], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(small_model, pairs, folder, checkpoint_every_steps=2)
    return Trained(folder)


@pytest.fixture(scope="module")
def smooth(small_model: Path, pairs: list[TokenizedPair], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """As tests.gradients has it."""
    folder = tmp_path_factory.mktemp("smooth")
    run(small_model, pairs, folder, record_gradients=True)
    return Trained(folder)


def without_time(trained: Trained) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in trained.metrics]


def all_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def tensors_of(checkpoint: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint holds, by torch's own converter."""
    dcp_to_torch_save(checkpoint, scratch / "tensors.pt")
    return torch.load(scratch / "tensors.pt", weights_only=True)


def swapped(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """With chosen and rejected in each other's place: who learns the pairs gets ever worse at these."""
    return [
        replace(
            p,
            chosen_ids=p.rejected_ids,
            rejected_ids=p.chosen_ids,
            chosen_ref_logprobs=p.rejected_ref_logprobs,
            rejected_ref_logprobs=p.chosen_ref_logprobs,
        )
        for p in pairs
    ]


def plain_logits(model: Path, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    """Of the positions that predict each completion, [length, V], by transformers' own forward."""
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        return [
            policy(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def plain_logprobs(model: Path, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Summed log-probs of completions, one sequence at a time, all logits held."""
    return torch.stack(
        [
            logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).sum()
            for logits, completion in zip(plain_logits(model, prompts, completions), completions, strict=True)
        ]
    )


def log_ratios(model: Path, base: Path, pairs: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor, Tensor]:
    """Δ of chosen, rejected and mismatched completions."""
    prompts = [p.prompt_ids for p in pairs]
    sides = [[p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs], [p.mismatched_ids or [] for p in pairs]]
    chosen, rejected, mismatched = (
        plain_logprobs(model, prompts, side) - plain_logprobs(base, prompts, side) for side in sides
    )
    return chosen, rejected, mismatched


# The first steps.


@pytest.mark.parametrize(
    ("loss", "value", "slope"),
    [
        ({"type": "sigmoid"}, math.log(2), 0.1),
        ({"type": "sigmoid", "label_smoothing": 0.3}, math.log(2), 0.1),
        ({"type": "robust"}, math.log(2), 0.1),
        ({"type": "hinge"}, 1.0, 0.1),
        ({"type": "ipo", "beta": 0.5}, 1.0, 2.0),  # 1 / 4β², and 1 / β
        ({"type": "sppo_hard", "beta": 0.5}, 2.0, 2.0),  # 1 / 2β², and 1 / β
        ({"type": "apo_zero"}, 1.0, 0.1),
        ({"type": "nca_pair"}, 2 * math.log(2), 0.1),
        ({"type": "bco_pair"}, 2 * math.log(2), 0.1),
        ({"type": "aot"}, math.log(2), 0.1),
        ({"type": "kto", "desirable_weight": 1.5, "undesirable_weight": 1.5}, 0.75, 0.1),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_first_loss_is_the_one_of_margin_zero(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path, loss: dict[str, Any], value: float, slope: float
):
    """The slope is the most that the loss, or a reward, moves by where a log-prob moves by 1."""
    run(small_model, pairs[:BATCH], tmp_path, loss=loss)
    (metrics,) = Trained(tmp_path).metrics
    near = slope * OF_PAIR
    assert metrics["loss"] == pytest.approx(value, abs=near)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert metrics[name] == pytest.approx(0.0, abs=near)
    assert metrics["grad_norm"] > 1e-4


def test_training_on_the_same_pairs_learns_to_prefer_them(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    run(small_model, pairs[:BATCH] * 6, tmp_path)
    learnt = Trained(tmp_path)
    assert learnt.losses == sorted(learnt.losses, reverse=True)
    assert learnt.losses[-1] < math.log(2) - 0.05
    assert learnt.metrics[-1]["rewards/accuracies"] == 1.0
    assert learnt.metrics[-1]["rewards/chosen"] > 0 > learnt.metrics[-1]["rewards/rejected"]


@pytest.mark.parametrize("tokens_per_microbatch", [1, 40, 10_000])
def test_the_split_into_microbatches_changes_no_metric(
    small_model: Path,
    pairs: list[TokenizedPair],
    smooth: Trained,
    tmp_path: Path,
    tokens_per_microbatch: int,
):
    run(small_model, pairs, tmp_path, tokens_per_microbatch=tokens_per_microbatch, record_gradients=True)
    split = Trained(tmp_path)
    assert len(set(smooth.losses)) == NUM_STEPS
    require_same(split.gradients, smooth.gradients)
    for metrics, expected in zip(without_time(split), without_time(smooth), strict=True):
        assert metrics == pytest.approx(expected, rel=GRADIENT, abs=OF_PAIR)


def test_the_order_within_a_step_does_not_change_the_trajectory(
    small_model: Path, pairs: list[TokenizedPair], smooth: Trained, tmp_path: Path
):
    turned = [p for i in range(0, len(pairs), BATCH) for p in reversed(pairs[i : i + BATCH])]
    run(small_model, turned, tmp_path, record_gradients=True)
    require_same(Trained(tmp_path).gradients, smooth.gradients)
    assert Trained(tmp_path).losses == pytest.approx(smooth.losses, abs=0.1 * OF_PAIR)


def test_the_metrics_of_a_step_by_hand(pairs: list[TokenizedPair], uninterrupted: Trained):
    config = Train(learning_rate=1e-3)
    total = 0
    for number, metrics in enumerate(uninterrupted.metrics):
        members = pairs[number * BATCH : (number + 1) * BATCH]
        # Tokens as two sequences a pair, the prompt in both.
        total += sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in members)
        assert metrics["num_tokens"] == total
        assert metrics["step"] == number + 1
        assert metrics["epoch"] == (number + 1) / NUM_STEPS
        assert metrics["learning_rate"] == learning_rate(number, NUM_STEPS, config)
        assert metrics["tokens_per_second"] > 0
        assert metrics["rewards/margins"] == pytest.approx(
            metrics["rewards/chosen"] - metrics["rewards/rejected"], abs=ulps(4, 1)
        )
    first = uninterrupted.metrics[0]
    chosen = [math.fsum(p.chosen_ref_logprobs or []) for p in pairs[:BATCH]]
    rejected = [math.fsum(p.rejected_ref_logprobs or []) for p in pairs[:BATCH]]
    assert first["logps/chosen"] == pytest.approx(sum(chosen) / BATCH, abs=OF_COMPLETION)
    assert first["logps/rejected"] == pytest.approx(sum(rejected) / BATCH, abs=OF_COMPLETION)
    assert not {"kl", "reward_mean", "skipped_pairs"} & first.keys()


# Checkpoints and resume.


def test_checkpoints_come_when_due_and_after_the_last_step(
    small_model: Path, pairs: list[TokenizedPair], uninterrupted: Trained, tmp_path: Path
):
    assert uninterrupted.checkpoints == [2, 4]
    run(small_model, pairs, tmp_path, checkpoint_every_steps=3, log_every_steps=2)
    assert Trained(tmp_path).checkpoints == [3, 4]
    assert Trained(tmp_path).of("step") == [2, 3, 4]


def test_the_trained_model_is_an_ordinary_folder(small_model: Path, uninterrupted: Trained):
    folder = uninterrupted.model
    names = {f.name for f in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    before, after = load_file(small_model / "model.safetensors"), uninterrupted.weights
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_a_run_killed_after_a_checkpoint_goes_on_bit_for_bit(
    small_model: Path, pairs: list[TokenizedPair], uninterrupted: Trained, tmp_path: Path
):
    with pytest.raises(InterruptedError):
        run(small_model, pairs, tmp_path / "first", die_at=2, checkpoint_every_steps=2)
    # Another random state than a fresh process would have: nothing may depend on it.
    torch.rand(7)
    run(small_model, pairs, tmp_path / "second", resume=tmp_path / "first" / "step-2")
    resumed = Trained(tmp_path / "second")
    assert resumed.checkpoints == [NUM_STEPS]
    assert all_equal(resumed.weights, uninterrupted.weights)
    assert without_time(resumed) == without_time(uninterrupted)


def test_a_finished_run_that_is_asked_again_does_nothing(
    small_model: Path, pairs: list[TokenizedPair], uninterrupted: Trained, tmp_path: Path
):
    useless = [replace(p, chosen_ref_logprobs=None) for p in pairs]
    state = run(small_model, useless, tmp_path / "again", resume=uninterrupted.last, num_steps=NUM_STEPS + 1)
    assert state.finished and state.next_step == NUM_STEPS
    assert not (tmp_path / "again").exists()


# Held-out pairs while training.


@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize("loss", ["sigmoid", "kto", "aot"])
def test_evaluations_come_every_n_steps_and_are_those_of_the_model_of_that_step(
    small_model: Path,
    pairs: list[TokenizedPair],
    held_out: list[TokenizedPair],
    tmp_path: Path,
    loss: str,
    ema_decay: float | None,
):
    beta, steps = 0.5, 3
    run(
        small_model, pairs[: steps * BATCH], tmp_path, held_out=held_out, eval_every_steps=2, ema_decay=ema_decay,
        loss={"type": loss, "beta": beta}, learning_rate=3e-3,
    )  # fmt: skip
    trained = Trained(tmp_path)
    assert [m["step"] for m in trained.metrics if "eval_loss" in m] == [2, 3]  # and at the end
    assert trained.checkpoints == [steps]
    found = {k.removeprefix("eval_"): v for k, v in trained.metrics[-1].items() if k.startswith("eval_")}
    chosen, rejected, mismatched = log_ratios(trained.model, small_model, held_out)
    margins = beta * (chosen - rejected)
    kl = mismatched.mean().clamp(min=0)
    losses = {
        "sigmoid": -logsigmoid(margins),
        "kto": (torch.sigmoid(beta * (kl - chosen)) + torch.sigmoid(beta * (rejected - kl))) / 2,
        # The reference's margins are sorted on their own.
        "aot": -logsigmoid(beta * _sorted_apart(trained.model, small_model, held_out)),
    }
    prompts = [p.prompt_ids for p in held_out]
    logits = {
        side: torch.cat(plain_logits(trained.model, prompts, completions))
        for side, completions in (
            ("chosen", [p.chosen_ids for p in held_out]), ("rejected", [p.rejected_ids for p in held_out])
        )
    }  # fmt: skip
    distributions = torch.distributions.Categorical(logits=torch.cat(list(logits.values())))
    expected = {
        "entropy": distributions.entropy().mean(),
        "logits/chosen": logits["chosen"].mean(),
        "logits/rejected": logits["rejected"].mean(),
        "loss": losses[loss].mean(),
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "logps/chosen": plain_logprobs(
            trained.model, [p.prompt_ids for p in held_out], [p.chosen_ids for p in held_out]
        ).mean(),
        "logps/rejected": plain_logprobs(
            trained.model, [p.prompt_ids for p in held_out], [p.rejected_ids for p in held_out]
        ).mean(),
        **({"kl": kl} if loss == "kto" else {}),
        "pairs": len(held_out),
        "margins": (chosen - rejected).mean(),
        "margins_se": (chosen - rejected).std(correction=0) / len(held_out) ** 0.5,
        "logratios/chosen": chosen.mean(),
        "logratios/chosen_se": chosen.std(correction=0) / len(held_out) ** 0.5,
    }
    chosen_logps = plain_logprobs(trained.model, [p.prompt_ids for p in held_out], [p.chosen_ids for p in held_out])
    expected["logps/chosen_se"] = chosen_logps.std(correction=0) / len(held_out) ** 0.5
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=OF_COMPLETION)
    assert abs(found["rewards/margins"]) > 1e-3


def test_entropy_and_mean_logits_are_reported_every_n_steps(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    run(small_model, pairs[: 4 * BATCH], tmp_path / "some", entropy_every_steps=2)
    run(small_model, pairs[: 4 * BATCH], tmp_path / "none", entropy_every_steps=None)
    some, none = Trained(tmp_path / "some"), Trained(tmp_path / "none")
    for name in ("entropy", "logits/chosen", "logits/rejected"):
        assert [m["step"] for m in some.metrics if name in m] == [2, 4]
        assert not any(name in m for m in none.metrics)
    assert some.losses == none.losses


def _sorted_apart(model: Path, base: Path, pairs: Sequence[TokenizedPair]) -> Tensor:
    prompts = [p.prompt_ids for p in pairs]
    of_policy, of_reference = (
        plain_logprobs(m, prompts, [p.chosen_ids for p in pairs])
        - plain_logprobs(m, prompts, [p.rejected_ids for p in pairs])
        for m in (model, base)
    )
    return of_policy.sort().values - of_reference.sort().values


def test_evaluations_do_not_change_the_training(
    small_model: Path,
    pairs: list[TokenizedPair],
    held_out: list[TokenizedPair],
    uninterrupted: Trained,
    tmp_path: Path,
):
    run(small_model, pairs, tmp_path, held_out=held_out, eval_every_steps=1)
    assert Trained(tmp_path).losses == uninterrupted.losses
    assert all_equal(Trained(tmp_path).weights, uninterrupted.weights)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_weights_of_the_best_evaluation_are_exported(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path, ema_decay: float | None
):
    batch = pairs[:BATCH]
    options = {"ema_decay": ema_decay, **STEADY}
    state = run(
        small_model, batch * 3, tmp_path / "kept", held_out=swapped(batch), eval_every_steps=1, keep_best="eval_loss",
        **options,
    )  # fmt: skip
    kept = Trained(tmp_path / "kept")
    assert kept.of("eval_loss") == sorted(kept.of("eval_loss"))
    assert kept.checkpoints == [1, 2, 3]  # every evaluation is one, for it may be the best
    assert state.next_step == 3
    run(small_model, batch, tmp_path / "short", **options)
    assert all_equal(kept.weights, Trained(tmp_path / "short").weights)
    # To go on from, it holds the weights of its own step.
    (tmp_path / "scratch").mkdir()
    run(small_model, batch * 3, tmp_path / "last", **options)
    own, last = (tensors_of(t.last, tmp_path / "scratch")["model"] for t in (kept, Trained(tmp_path / "last")))
    assert all_equal(own, last)


def test_training_stops_when_the_held_out_metric_no_longer_improves(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    batch = pairs[:BATCH]
    options: dict[str, Any] = {
        "held_out": swapped(batch),
        "eval_every_steps": 1,
        "early_stopping": {"metric": "eval_rewards/margins", "patience": 2},
    }
    state = run(small_model, batch * 6, tmp_path / "first", **options)
    stopped = Trained(tmp_path / "first")
    assert (state.next_step, state.finished) == (3, True)  # the first evaluation was best, and two came after it
    assert stopped.checkpoints == [3]
    assert stopped.of("step") == [1, 2, 3]
    assert stopped.weights.keys() == load_file(small_model / "model.safetensors").keys()

    useless = [replace(p, chosen_ref_logprobs=None) for p in batch] * 6
    again = run(small_model, useless, tmp_path / "again", resume=stopped.last, **options)
    assert (again.next_step, again.finished) == (3, True)
    assert not (tmp_path / "again").exists()


def test_the_exported_model_is_the_moving_average_of_the_weights(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    weights = [load_file(small_model / "model.safetensors")]
    for steps in (1, 2, 3):
        run(small_model, pairs[: steps * BATCH], tmp_path / str(steps), **STEADY)
        weights.append(Trained(tmp_path / str(steps)).weights)
    run(small_model, pairs[: 3 * BATCH], tmp_path / "averaged", ema_decay=0.75, **STEADY)
    averaged = Trained(tmp_path / "averaged").weights
    # ((w0 · ¾ + w1 · ¼) · ¾ + w2 · ¼) · ¾ + w3 · ¼
    parts = (27 / 64, 9 / 64, 12 / 64, 16 / 64)
    for name, value in averaged.items():
        expected = sum((part * w[name] for part, w in zip(parts, weights, strict=True)), torch.zeros(()))
        torch.testing.assert_close(value, expected, rtol=0, atol=ulps(8, 1))  # three averages, and a sum of four
        assert float((value - weights[-1][name]).abs().max()) > 1e-4
    # What is trained is not the average.
    (tmp_path / "scratch").mkdir()
    trained = tensors_of(tmp_path / "averaged" / "step-3", tmp_path / "scratch")["model"]
    assert torch.equal(trained["model.norm.weight"], weights[-1]["model.norm.weight"])


def test_a_resumed_run_goes_on_with_its_average(small_model: Path, pairs: list[TokenizedPair], tmp_path: Path):
    options = {"ema_decay": 0.5, "checkpoint_every_steps": 2}
    run(small_model, pairs, tmp_path / "whole", **options)
    run(small_model, pairs, tmp_path / "resumed", resume=tmp_path / "whole" / "step-2", **options)
    assert all_equal(Trained(tmp_path / "resumed").weights, Trained(tmp_path / "whole").weights)


def test_who_asks_is_told_of_every_step_also_of_those_that_are_not_logged(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    told: list[tuple[dict[str, Any], int]] = []
    run(small_model, pairs, tmp_path, log_every_steps=50, told=lambda step, tokens: told.append((step, tokens)))
    assert [step["step"] for step, _ in told] == [1, 2, 3, 4]
    last, _ = told[-1]
    assert sum(tokens for _, tokens in told) == last["num_tokens"] and Trained(tmp_path).metrics == [last]


# What is wrong with the pairs.


def without_a_number(pair: TokenizedPair) -> TokenizedPair:
    return replace(pair, chosen_ref_logprobs=[math.nan] * len(pair.chosen_ids))


def test_a_step_whose_loss_is_not_a_number_is_left_out_and_names_its_pairs(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    bad = [*pairs]
    bad[BATCH + 1] = without_a_number(bad[BATCH + 1])
    run(small_model, bad, tmp_path / "run", max_nonfinite_steps=1, checkpoint_every_steps=1, log_every_steps=50,
        ema_decay=0.5)  # fmt: skip
    trained = Trained(tmp_path / "run")
    assert trained.of("step") == [1, 2, 3, 4]
    skipped = trained.metrics[1]
    assert sorted(skipped.pop("skipped_pairs")) == sorted(p.pair_id for p in pairs[BATCH : 2 * BATCH])
    assert skipped.keys() == {"step", "epoch", "learning_rate", "tokens_per_second", "num_tokens"}
    assert all(math.isfinite(m["loss"]) for m in (trained.metrics[0], *trained.metrics[2:]))
    (tmp_path / "scratch").mkdir()
    before, after, later = (
        tensors_of(tmp_path / "run" / f"step-{n}", tmp_path / "scratch") for n in (1, 2, 3)
    )  # fmt: skip
    for part in ("model", "average"):
        assert all_equal(before[part], after[part])
        assert not torch.equal(after[part]["model.norm.weight"], later[part]["model.norm.weight"])
    moments = [
        t["optimizer"]["state"]["model.norm.weight"] if "state" in t["optimizer"] else t["optimizer"]
        for t in (before, after)
    ]
    assert moments[0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all_equal(*moments)


def test_one_step_too_many_without_a_number_ends_the_run(small_model: Path, pairs: list[TokenizedPair], tmp_path: Path):
    bad = [*pairs]
    bad[BATCH + 1] = without_a_number(bad[BATCH + 1])
    told: list[dict[str, Any]] = []
    with pytest.raises(NonFiniteLoss) as caught:
        run(small_model, bad, tmp_path / "none", checkpoint_every_steps=1, told=lambda step, _: told.append(step))
    assert [SKIPPED in step for step in told] == [False, True]  # before it ends the training
    assert "Step 2" in str(caught.value) and f"pair-{BATCH + 1}" in str(caught.value)
    assert "train.max_nonfinite_steps=0" in str(caught.value)
    assert Trained(tmp_path / "none").checkpoints == [1]

    bad[-1] = without_a_number(bad[-1])
    with pytest.raises(NonFiniteLoss, match=f"Step {NUM_STEPS}.*2 such steps"):
        run(small_model, bad, tmp_path / "one", checkpoint_every_steps=2, max_nonfinite_steps=1)
    # Those before a resume count too.
    with pytest.raises(NonFiniteLoss, match=f"Step {NUM_STEPS}.*2 such steps"):
        run(small_model, bad, tmp_path / "resumed", resume=tmp_path / "one" / "step-2", max_nonfinite_steps=1)


def test_evaluation_without_a_number_ends_the_run(small_model: Path, pairs: list[TokenizedPair], tmp_path: Path):
    held_out = [pairs[0], without_a_number(pairs[1])]
    with pytest.raises(NonFiniteLoss, match="2 held-out pairs"):
        run(small_model, pairs[:BATCH], tmp_path, held_out=held_out, eval_every_steps=1)


def test_pairs_without_reference_are_not_trained_on(small_model: Path, pairs: list[TokenizedPair], tmp_path: Path):
    bad = [replace(pairs[0], rejected_ref_logprobs=None), *pairs[1:]]
    with pytest.raises(DataError, match="pair-0 has"):
        run(small_model, bad, tmp_path)
    with pytest.raises(DataError, match="no reference log-probs"):
        run(small_model, random_pairs(BATCH), tmp_path)


def off(pair: TokenizedPair, nats: float) -> TokenizedPair:
    """The stored reference log-probs of its answers moved, each token's."""
    assert pair.chosen_ref_logprobs is not None and pair.rejected_ref_logprobs is not None
    chosen, rejected = ([v + nats for v in side] for side in (pair.chosen_ref_logprobs, pair.rejected_ref_logprobs))
    return replace(pair, chosen_ref_logprobs=chosen, rejected_ref_logprobs=rejected)


def test_a_reference_that_is_not_the_model_stops_the_first_step(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    wrong = r"of 16 completions the mean of Δ per token is -5\.0e-02 ± .*bias_per_token=0\.0005.*p99_per_token=0\.01"
    with pytest.raises(ReferenceMismatch, match=wrong):
        run(small_model, [off(pair, 0.05) for pair in pairs[:BATCH]], tmp_path / "over")
    assert not (tmp_path / "over").exists()
    with pytest.raises(ReferenceMismatch, match="99th percentile"):  # one pair of eight
        run(small_model, [*pairs[:5], off(pairs[5], 0.05), *pairs[6:8]], tmp_path / "one")
    with pytest.raises(ReferenceMismatch, match="not finite"):
        run(small_model, [without_a_number(pairs[0]), *pairs[1:8]], tmp_path / "nan", max_nonfinite_steps=1)


@pytest.mark.parametrize(
    ("first", "nats", "options"),
    [
        (0, 4e-4, {}),
        (BATCH, 0.05, {}),  # by then policy and reference differ anyway
        (0, 0.05, {"reference_tolerance": None}),
        (0, 0.05, {"reference_tolerance": Tolerance(bias_per_token=0.1, p99_per_token=0.1, worst_token=0.1)}),
        (0, 0.05, {"loss": {"type": "simpo"}}),
    ],
    ids=["within the tolerance", "at a later step", "no tolerance", "a wider tolerance", "no reference"],
)
def test_a_reference_is_held_against_the_model_at_the_first_step_only(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path, first: int, nats: float, options: dict[str, Any]
):
    moved = [*pairs[:first], *(off(pair, nats) for pair in pairs[first : 2 * BATCH])]
    assert run(small_model, moved, tmp_path, **options).finished


# Adapters.


def test_adapters_alone_are_trained_kept_and_resumed(small_model: Path, pairs: list[TokenizedPair], tmp_path: Path):
    model = Model(path=str(small_model), lora=LoRA(rank=2, alpha=4.0))
    run(model, pairs, tmp_path / "whole", checkpoint_every_steps=2)
    run(model, pairs, tmp_path / "resumed", resume=tmp_path / "whole" / "step-2")
    whole, resumed = Trained(tmp_path / "whole"), Trained(tmp_path / "resumed")
    assert len(set(whole.losses)) == NUM_STEPS
    assert without_time(resumed) == without_time(whole)

    names = FileSystemReader(whole.last).read_metadata().state_dict_metadata
    assert all("lora_" in name for name in names if not name.startswith("optimizer.param_groups"))
    # The adapters of a rank-2 update have 2 · (in + out) weights, each of which AdamW keeps two numbers for.
    layers = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    weights = 2 * sum(2 * (a + b) for a, b in layers)
    held = sum(math.prod(m.size) for name, m in names.items() if name.startswith("model."))
    assert held == weights
    adapters = [load_file(t.model / "adapter_model.safetensors") for t in (whole, resumed)]
    assert sum(t.numel() for t in adapters[0].values()) == weights
    assert all_equal(*adapters)
    assert not (whole.model / "model.safetensors").exists()


def test_with_merged_adapters_what_has_none_stays_as_it_was(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    model = Model(path=str(small_model), lora=LoRA(rank=2, target_modules=("q_proj",), export="merged"))
    run(model, pairs, tmp_path)
    before, after = load_file(small_model / "model.safetensors"), Trained(tmp_path).weights
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


# Losses that take more than a pair, or less.


def test_the_running_mean_of_the_rewards_survives_a_resume(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    loss = {"type": "bco_pair", "beta": 0.5}
    run(small_model, pairs, tmp_path / "whole", loss=loss, checkpoint_every_steps=2)
    whole = Trained(tmp_path / "whole")
    rewards = [(m["rewards/chosen"] + m["rewards/rejected"]) / 2 for m in whole.metrics]
    expected = [sum(rewards[:n]) / max(n, 1) for n in range(NUM_STEPS)]
    assert whole.of("reward_mean") == pytest.approx(expected, abs=1e-9)
    assert abs(expected[-1]) > 1e-4
    run(small_model, pairs, tmp_path / "resumed", loss=loss, resume=tmp_path / "whole" / "step-2")
    assert without_time(Trained(tmp_path / "resumed")) == without_time(whole)
    assert all_equal(Trained(tmp_path / "resumed").weights, whole.weights)


def test_without_mismatched_completions_kto_compares_with_zero(
    small_model: Path, pairs: list[TokenizedPair], held_out: list[TokenizedPair], tmp_path: Path
):
    plain, few = (
        [replace(p, mismatched_ids=None, mismatched_ref_logprobs=None) for p in part] for part in (pairs, held_out)
    )  # fmt: skip
    run(small_model, plain, tmp_path, loss={"type": "kto", "beta": 0.5}, held_out=few, eval_every_steps=4,
        learning_rate=3e-3)  # fmt: skip
    trained = Trained(tmp_path)
    assert all("kl" not in m and "eval_kl" not in m for m in trained.metrics)  # nobody has measured it
    chosen, rejected, _ = log_ratios(trained.model, small_model, held_out)
    expected = (torch.sigmoid(-0.5 * chosen) + torch.sigmoid(0.5 * rejected)).mean() / 2
    assert trained.metrics[-1]["eval_loss"] == pytest.approx(float(expected), abs=0.5 * OF_PAIR)
    assert trained.metrics[-1]["eval_loss"] != pytest.approx(0.5, abs=1e-4)


def test_the_mismatched_completions_of_some_rows_are_enough(
    small_model: Path, pairs: list[TokenizedPair], held_out: list[TokenizedPair], tmp_path: Path
):
    some = [p if i in (1, 2) else replace(p, mismatched_ids=None) for i, p in enumerate(held_out)]
    # Micro-batches of one pair: most have no mismatched completion.
    run(small_model, pairs[:BATCH] * 3, tmp_path, loss={"type": "kto"}, tokens_per_microbatch=1, held_out=some,
        eval_every_steps=3, learning_rate=1e-2)  # fmt: skip
    trained = Trained(tmp_path)
    _, _, mismatched = log_ratios(trained.model, small_model, held_out)
    expected = float(mismatched[1:3].mean().clamp(min=0))
    assert expected > 1e-2
    assert trained.metrics[-1]["eval_kl"] == pytest.approx(expected, abs=OF_COMPLETION)
    assert trained.of("kl")[0] == pytest.approx(0.0, abs=OF_COMPLETION)


def test_rows_with_one_answer_train_and_what_nobody_has_is_not_reported(
    small_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    liked = [replace(p, rejected_ids=[], rejected_ref_logprobs=[]) for p in pairs[:BATCH]]
    disliked = [replace(p, chosen_ids=[], chosen_ref_logprobs=[]) for p in pairs[BATCH : 2 * BATCH]]
    mixed = [*liked[:3], *disliked[:3], *pairs[:2]]
    run(small_model, [*liked, *disliked, *mixed], tmp_path, loss={"type": "kto", "beta": 0.5}, log_every_steps=1)
    of_liked, of_disliked, of_mixed = Trained(tmp_path).metrics
    assert of_liked["loss"] == pytest.approx(0.5, abs=0.5 * OF_PAIR)
    assert {n for n in of_liked if "/" in n} == {"rewards/chosen", "logps/chosen"}
    assert {n for n in of_disliked if "/" in n} == {"rewards/rejected", "logps/rejected"}
    assert of_mixed.keys() >= {"rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/rejected"}
    # Tokens as a sequence for each answer that is there.
    assert of_liked["num_tokens"] == sum(len(p.prompt_ids) + len(p.chosen_ids) for p in liked)
    # The liked answers became likelier, and rewards are averages over those who have the answer.
    assert of_mixed["rewards/chosen"] > 1e-3


def test_held_out_rows_with_one_answer_are_compared_each_with_each(
    small_model: Path, pairs: list[TokenizedPair], held_out: list[TokenizedPair], tmp_path: Path
):
    liked = [replace(p, rejected_ids=[], rejected_ref_logprobs=[]) for p in held_out[:3]]
    disliked = [replace(p, chosen_ids=[], chosen_ref_logprobs=[]) for p in held_out[2:4]]
    run(small_model, pairs, tmp_path, loss={"type": "kto", "beta": 0.5}, held_out=[*liked, *disliked],
        eval_every_steps=NUM_STEPS, learning_rate=3e-3)  # fmt: skip
    trained = Trained(tmp_path)
    chosen, rejected, _ = log_ratios(trained.model, small_model, held_out)
    couples = chosen[:3, None] - rejected[None, 2:4]
    found = trained.metrics[-1]
    assert found["eval_pairs"] == 2  # as many independent couples as there are of the fewer
    assert found["eval_rewards/accuracies"] == pytest.approx(float((couples > 0).double().mean()))
    assert found["eval_margins"] == pytest.approx(float(couples.mean()), abs=OF_COMPLETION)
    expected = float(couples.double().std(correction=0)) / 2**0.5
    assert found["eval_margins_se"] == pytest.approx(expected, abs=OF_COMPLETION)


def test_an_evaluation_without_a_checkpoint_is_told(
    small_model: Path,
    pairs: list[TokenizedPair],
    held_out: list[TokenizedPair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(Kept, "report", lambda self, metrics: told.append(metrics))
    run(small_model, pairs, tmp_path, held_out=held_out, eval_every_steps=1, checkpoint_every_steps=2)
    trained = Trained(tmp_path)
    evaluated = {m["step"]: m for m in trained.metrics if "eval_loss" in m}
    assert told == [m for step, m in evaluated.items() if step not in trained.checkpoints] and told


def test_a_loss_without_reference_trains_on_pairs_without_one(small_model: Path, tmp_path: Path):
    beta, margin = 2.0, 0.5
    pairs = random_pairs(BATCH)
    run(small_model, pairs * 4, tmp_path, loss={"type": "simpo", "beta": beta, "target_margin": margin})
    trained = Trained(tmp_path)
    prompts = [p.prompt_ids for p in pairs]
    chosen, rejected = (
        plain_logprobs(small_model, prompts, side) / torch.tensor([len(ids) for ids in side])
        for side in ([p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs])
    )
    expected = -logsigmoid(beta * (chosen - rejected) - margin).mean()
    assert trained.losses[0] == pytest.approx(float(expected), abs=beta * of_logprob(512))
    assert trained.metrics[0]["rewards/chosen"] == pytest.approx(
        float(beta * chosen.mean()), abs=beta * of_logprob(512)
    )
    assert trained.losses[-1] < trained.losses[0] - 0.01


# Warned that a worker will be lost.


class Warned:
    """Warns after one of the steps."""

    def __init__(self, step: int) -> None:
        self.step, self.steps = step, 0

    def __call__(self) -> bool:
        self.steps += 1
        return self.steps == self.step


def test_forewarned_the_step_is_kept_and_a_run_that_goes_on_from_there_ends_the_same(
    small_model: Path, pairs: list[TokenizedPair], uninterrupted: Trained, tmp_path: Path
):
    rare = {"checkpoint_every_steps": 100, "log_every_steps": 100}
    run(small_model, pairs, tmp_path / "warned", is_forewarned=Warned(3), **rare)
    warned = Trained(tmp_path / "warned")
    assert warned.checkpoints == [3, NUM_STEPS]
    assert all_equal(warned.weights, uninterrupted.weights)
    run(small_model, pairs, tmp_path / "resumed", resume=warned.folder / "step-3", **rare)
    resumed = Trained(tmp_path / "resumed")
    assert all_equal(resumed.weights, uninterrupted.weights)
    assert resumed.of("num_tokens")[-1] == uninterrupted.of("num_tokens")[-1]
