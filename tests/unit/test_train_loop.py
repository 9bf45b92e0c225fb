"""The training loop on a tiny model, fed from memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_ray.checkpoint import read_history
from dpo_ray.config import Model, Train
from dpo_ray.errors import DataError, DpoRayError
from dpo_ray.model import CompletionScorer, load_policy
from dpo_ray.optim import learning_rate
from dpo_ray.packing import pack
from dpo_ray.pairs import TokenizedPair
from dpo_ray.train_loop import EXPORT, Rank, Step, pair_logps, train

BATCH, NUM_STEPS = 8, 4


@pytest.fixture(scope="module")
def pairs(tiny_model: Path) -> list[TokenizedPair]:
    """Pairs of random tokens, with reference log-probs from the trainer's own forward at its start."""
    random = torch.Generator().manual_seed(0)

    def ids(longest: int) -> list[int]:
        count = int(torch.randint(1, longest + 1, (1,), generator=random))
        return torch.randint(3, 49152, (count,), generator=random).tolist()

    made = [TokenizedPair(f"pair-{i}", ids(12), ids(8), ids(8)) for i in range(BATCH * NUM_STEPS)]
    scorer = CompletionScorer(load_policy(tiny_model), torch.float32)
    scored = []
    with torch.no_grad():
        for pair in made:
            values = scorer(pack([pair])).tolist()
            cut = len(pair.chosen_ids)
            scored.append(replace(pair, chosen_ref_logprobs=values[:cut], rejected_ref_logprobs=values[cut:]))
    return scored


def feed(pairs: list[TokenizedPair], per_microbatch: int = 4) -> Callable[[int], list[Step]]:
    """Steps of BATCH pairs in order, each cut into micro-batches."""
    steps = []
    for number in range(len(pairs) // BATCH):
        members = pairs[number * BATCH : (number + 1) * BATCH]
        cut = [members[i : i + per_microbatch] for i in range(0, BATCH, per_microbatch)]
        steps.append(Step(number, cut))
    return lambda start: steps[start:]


class Reports:
    """Keeps the checkpoints that are reported; may die after one, as a killed worker would."""

    def __init__(self, keep: Path, die_at: int | None = None):
        self.keep = keep
        self.die_at = die_at
        self.checkpoints: list[int] = []

    def __call__(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        assert checkpoint is not None
        self.checkpoints.append(metrics["step"])
        shutil.copytree(checkpoint, self.folder)
        assert self.metrics[-1] == metrics
        if metrics["step"] == self.die_at:
            raise InterruptedError("killed")

    @property
    def folder(self) -> Path:
        """The last checkpoint."""
        return self.keep / f"step-{self.checkpoints[-1]}"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Those of every logged step, as the last checkpoint holds them."""
        return read_history(self.folder)

    @property
    def losses(self) -> list[float]:
        return [m["loss"] for m in self.metrics]


def run(
    model: Path,
    steps_from: Callable[[int], Any],
    reports: Reports,
    *,
    resume: Path | None = None,
    num_steps: int = NUM_STEPS,
    **options: Any,
) -> Reports:
    values = {"learning_rate": 1e-3, "global_batch_size": BATCH, "checkpoint_every_steps": 100, **options}
    train(
        Model(path=str(model)),
        Train.model_validate(values),
        seed=0,
        num_steps=num_steps,
        pairs_per_epoch=BATCH * NUM_STEPS,
        me=Rank(0, 1, torch.device("cpu")),
        steps_from=steps_from,
        report=reports,
        resume=resume,
    )
    return reports


def exported(reports: Reports) -> dict[str, torch.Tensor]:
    return load_file(reports.folder / EXPORT / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, pairs: list[TokenizedPair], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    reports = Reports(tmp_path_factory.mktemp("uninterrupted"))
    return run(tiny_model, feed(pairs), reports, checkpoint_every_steps=2)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        ({"type": "sigmoid"}, math.log(2)),
        ({"type": "sigmoid", "label_smoothing": 0.3}, math.log(2)),
        ({"type": "robust"}, math.log(2)),
        ({"type": "hinge"}, 1.0),
        ({"type": "ipo", "beta": 0.5}, 1.0),  # 1 / 4β²
    ],
    ids=["sigmoid", "conservative", "robust", "hinge", "ipo"],
)
def test_the_first_loss_is_the_one_of_margin_zero(
    tiny_model: Path, pairs: list[TokenizedPair], tmp_path: Path, loss: dict[str, Any], value: float
):
    reports = run(tiny_model, feed(pairs[:BATCH]), Reports(tmp_path), num_steps=1, loss=loss)
    assert reports.losses == [pytest.approx(value, abs=1e-6)]
    assert reports.metrics[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_training_on_the_same_pairs_learns_to_prefer_them(tiny_model: Path, pairs: list[TokenizedPair], tmp_path: Path):
    again = pairs[:BATCH] * 6
    reports = run(tiny_model, feed(again), Reports(tmp_path), num_steps=6)
    assert reports.losses == sorted(reports.losses, reverse=True)
    assert reports.losses[-1] < math.log(2) - 0.05
    assert reports.metrics[-1]["rewards/accuracies"] == 1.0
    assert reports.metrics[-1]["rewards/chosen"] > 0 > reports.metrics[-1]["rewards/rejected"]


@pytest.mark.parametrize("per_microbatch", [1, 3, 8])
def test_the_split_into_microbatches_does_not_change_the_trajectory(
    tiny_model: Path, pairs: list[TokenizedPair], uninterrupted: Reports, tmp_path: Path, per_microbatch: int
):
    reports = run(tiny_model, feed(pairs, per_microbatch), Reports(tmp_path))
    assert len(set(uninterrupted.losses)) == NUM_STEPS
    assert reports.losses == pytest.approx(uninterrupted.losses, abs=1e-5)
    for name in ("grad_norm", "rewards/margins", "logps/chosen", "logps/rejected"):
        values = [[m[name] for m in r.metrics] for r in (reports, uninterrupted)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-5), name


def test_the_order_within_a_step_does_not_change_the_trajectory(
    tiny_model: Path, pairs: list[TokenizedPair], uninterrupted: Reports, tmp_path: Path
):
    shuffled = [p for i in range(0, len(pairs), BATCH) for p in reversed(pairs[i : i + BATCH])]
    reports = run(tiny_model, feed(shuffled), Reports(tmp_path))
    assert reports.losses == pytest.approx(uninterrupted.losses, abs=1e-5)


def test_a_run_killed_after_a_checkpoint_goes_on_bit_for_bit(
    tiny_model: Path, pairs: list[TokenizedPair], uninterrupted: Reports, tmp_path: Path
):
    with pytest.raises(InterruptedError):
        run(tiny_model, feed(pairs), Reports(tmp_path / "first", die_at=2), checkpoint_every_steps=2)
    # Another random state than a fresh process would have: nothing may depend on it.
    torch.rand(7)
    resumed = run(tiny_model, feed(pairs), Reports(tmp_path / "second"), resume=tmp_path / "first" / "step-2")
    assert resumed.checkpoints == [NUM_STEPS]
    expected, got = exported(uninterrupted), exported(resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    def without_time(reports: Reports) -> list[dict[str, Any]]:
        return [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in reports.metrics]

    assert without_time(resumed) == without_time(uninterrupted)


def test_a_finished_run_that_is_asked_again_does_nothing(
    tiny_model: Path, pairs: list[TokenizedPair], uninterrupted: Reports, tmp_path: Path
):
    def never(start: int) -> Iterator[Step]:
        raise AssertionError(f"asked for steps from {start}")

    reports = run(tiny_model, never, Reports(tmp_path), resume=uninterrupted.folder)
    assert reports.checkpoints == []


def test_the_metrics_of_a_step_by_hand(tiny_model: Path, pairs: list[TokenizedPair], uninterrupted: Reports):
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
            metrics["rewards/chosen"] - metrics["rewards/rejected"], abs=1e-6
        )
    first = uninterrupted.metrics[0]
    chosen = [math.fsum(p.chosen_ref_logprobs or []) for p in pairs[:BATCH]]
    assert first["logps/chosen"] == pytest.approx(sum(chosen) / BATCH, abs=1e-4)


def test_checkpoints_come_when_due_and_after_the_last_step(
    tiny_model: Path, pairs: list[TokenizedPair], uninterrupted: Reports, tmp_path: Path
):
    assert uninterrupted.checkpoints == [2, 4]
    reports = run(tiny_model, feed(pairs), Reports(tmp_path), checkpoint_every_steps=3, log_every_steps=2)
    assert reports.checkpoints == [3, 4]
    assert [m["step"] for m in reports.metrics] == [2, 3, 4]


def test_the_last_checkpoint_holds_an_ordinary_model_folder(tiny_model: Path, uninterrupted: Reports):
    folder = uninterrupted.folder / EXPORT
    assert not (uninterrupted.keep / "step-2" / EXPORT).exists()
    names = {f.name for f in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    before, after = load_file(tiny_model / "model.safetensors"), exported(uninterrupted)
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_a_reference_that_is_not_a_number_stops_the_run_and_names_the_pairs(
    tiny_model: Path, pairs: list[TokenizedPair], tmp_path: Path
):
    bad = [*pairs]
    bad[BATCH + 1] = replace(bad[BATCH + 1], chosen_ref_logprobs=[math.nan])
    reports = Reports(tmp_path)
    with pytest.raises(DpoRayError) as caught:
        run(tiny_model, feed(bad), reports, checkpoint_every_steps=1)
    assert "Step 2" in str(caught.value) and f"pair-{BATCH + 1}" in str(caught.value)
    assert reports.checkpoints == [1]


def test_pairs_without_reference_are_not_trained_on(tiny_model: Path, pairs: list[TokenizedPair], tmp_path: Path):
    bad = [replace(pairs[0], rejected_ref_logprobs=None), *pairs[1:]]
    with pytest.raises(DataError, match="pair-0 has no reference"):
        run(tiny_model, feed(bad), Reports(tmp_path))


def test_token_logprobs_and_reference_add_up_by_pair():
    first = TokenizedPair("a", [1], [2, 3], [4], [-0.5, -0.25], [-4.0])
    second = TokenizedPair("b", [1], [5], [6, 7], [-1.0], [-2.0, -3.0])
    batch = pack([first, second])
    logps = pair_logps(torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0]), batch, [first, second])
    assert logps.policy_chosen.tolist() == [-1 - 2, -8]
    assert logps.policy_rejected.tolist() == [-4, -16 - 32]
    assert logps.ref_chosen.tolist() == [-0.75, -1]
    assert logps.ref_rejected.tolist() == [-4, -5]
    assert logps.num_chosen_tokens.tolist() == [2, 1]
    assert logps.num_rejected_tokens.tolist() == [1, 2]
