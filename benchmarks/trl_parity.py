"""Parity with TRL: the same model, pairs, order and optimizer in both trainers, and the metrics of every step compared.

    python -m benchmarks.trl_parity --trl-python <Python of the environment of requirements-trl.txt>

runs all of it in the project's environment. Its parts can run apart, each in its own environment:
`--side pairs`, `--side ours`, `--side trl`, `--compare`. They meet in a folder:

    setting.json                     the model's folder and where the pairs come from
    pairs.jsonl                      token ids, computed once by the project's tokenization and read by both sides
    <side>/environment.json          versions, hardware, commit
    <side>/<case>.jsonl              metrics, a line a step
    <side>/<case>.recut.jsonl        the same side again with the batch laid out otherwise: its own noise

The pairs are the first short ones of polite_demo where DPO_RAY_DATA names the folder of real data, and otherwise made
from the demo's prompts. The trainers' own packages are imported where they are used, for no environment has both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.record import (
    OUR_PACKAGES,
    ROOT,
    TRL_PACKAGES,
    environment,
    read_lines,
    table,
    versions,
    write_json,
    write_lines,
)
from benchmarks.record import Rows as Steps
from benchmarks.side_by_side import (
    LEARNING_RATE,
    MODEL,
    SEED,
    NoCheckpoints,
    Pair,
    dpo_config,
    longest,
    preference_pairs,
    token_ids,
    token_ids_trainer,
    train_options,
    with_reference,
)

if TYPE_CHECKING:
    from dpo_ray.pairs import TokenizedPair

NUM_STEPS = 20
BATCH_SIZE = 4
MAX_TOKENS = 120
"""Of the prompt and its longer completion: longer pairs are left out, to keep a run short."""

# Some ten times what either side differs from itself when its batch is laid out otherwise: float32 sums in another
# order, carried on by the optimizer for NUM_STEPS steps.
LOSS_TOLERANCE = 2e-5
"""Of |Δloss| / max(1, loss)."""
GRAD_NORM_TOLERANCE = 1e-4
"""Of |Δgrad_norm| / grad_norm."""
REWARD_TOLERANCE = 1e-3
"""Of |Δreward| / β, in nats a completion."""


@dataclass(frozen=True)
class Case:
    """A loss as both sides train it."""

    loss: str
    beta: float = 0.1
    label_smoothing: float = 0.0
    per_token: bool = False
    """Whether the loss compares means per token. The rewards that TRL logs are of sums for every loss."""

    @property
    def our_options(self) -> dict[str, Any]:
        """The section train.loss."""
        smoothing = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return {"type": self.loss, "beta": self.beta, **smoothing}


CASES = {
    case.loss: case
    for case in (
        Case("sigmoid"),
        Case("ipo", per_token=True),
        Case("hinge"),
        Case("robust", label_smoothing=0.1),
        Case("apo_zero"),
        Case("sigmoid_norm", beta=5.0, per_token=True),
    )
}
RECUT = "sigmoid"
"""The case that each side runs twice."""

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
METRICS = ("loss", "grad_norm", *REWARDS, "rewards/accuracies", "logps/chosen", "logps/rejected")


# The pairs


def write_pairs(folder: Path) -> None:
    """Tokenize the pairs; in the project's environment."""
    from dpo_ray.model.folders import load_tokenizer
    from dpo_ray.model.resolve import resolve

    model = resolve(MODEL)
    tokenizer = load_tokenizer(model)
    data = os.environ.get("DPO_RAY_DATA")
    source = "polite_demo" if data else "made from pipelines/configs/demo_prompts.jsonl"
    rows: Steps = []
    for pair in preference_pairs(Path(data) / "polite_demo") if data else _made_pairs():
        row = token_ids(tokenizer, pair)
        if longest(row) <= MAX_TOKENS:
            rows.append(row)
        if len(rows) == NUM_STEPS * BATCH_SIZE:
            break
    else:
        sys.exit(f"Only {len(rows)} pairs have at most {MAX_TOKENS} tokens; {NUM_STEPS * BATCH_SIZE} are needed.")
    write_lines(folder / "pairs.jsonl", rows)
    write_json(folder / "setting.json", {"model": str(model), "source": source})


def _made_pairs() -> Iterable[Pair]:
    """Each of the demo's prompts with two completions of different lengths: what they say does not matter here."""
    polite = ("Thank you for asking.", "That is a good question, and I am glad to help with it.", "Gladly.")
    blunt = ("No idea.", "Look it up yourself, it is not that hard to find.", "Who cares, honestly?", "Next question.")
    lines = (ROOT / "pipelines" / "configs" / "demo_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        prompt = json.loads(line)["prompt"]
        question = prompt[-1]["content"]
        chosen = f"{polite[number % len(polite)]} You would like to know: {question}"
        yield prompt, chosen, blunt[number % len(blunt)]


# Our side


def run_ours(folder: Path, cases: Sequence[Case]) -> None:
    """Train with dpo_ray.training.loop.train, one worker, on reference log-probs by the trainer's own forward."""
    from dpo_ray.config import Model
    from dpo_ray.model.pair_scorer import TorchScorer
    from dpo_ray.pairs import TokenizedPair

    setting = json.loads((folder / "setting.json").read_text())
    model = Model(path=setting["model"], dtype="float32")
    unscored = [TokenizedPair(f"{n}", **row) for n, row in enumerate(read_lines(folder / "pairs.jsonl"))]
    pairs = with_reference(unscored, TorchScorer(model).score(unscored))
    write_json(folder / "ours" / "environment.json", environment(OUR_PACKAGES))
    for case in cases:
        write_lines(folder / "ours" / f"{case.loss}.jsonl", _train_ours(setting["model"], pairs, case, folder))
        if case.loss == RECUT:
            again = _train_ours(setting["model"], pairs, case, folder, pairs_per_microbatch=1)
            write_lines(folder / "ours" / f"{case.loss}.recut.jsonl", again)


def _train_ours(
    model: str, pairs: Sequence[TokenizedPair], case: Case, folder: Path, pairs_per_microbatch: int = BATCH_SIZE
) -> Steps:
    import torch

    from dpo_ray.config import Model
    from dpo_ray.config.tolerance import Tolerance
    from dpo_ray.evaluation.agreement import require_same_start
    from dpo_ray.storage.location import Location
    from dpo_ray.training.batch import Share, Step
    from dpo_ray.training.loop import train
    from dpo_ray.training.parallel import Rank

    def steps_from(start: int) -> Iterable[Step]:
        for number in range(start, NUM_STEPS):
            members = list(pairs[number * BATCH_SIZE : (number + 1) * BATCH_SIZE])
            cut = [members[i : i + pairs_per_microbatch] for i in range(0, BATCH_SIZE, pairs_per_microbatch)]
            yield Step(number, Share(cut, filler=members[0]))

    began = time.monotonic()
    state = train(
        Model(path=model, dtype="float32"),
        train_options(BATCH_SIZE, checkpoint_every_steps=NUM_STEPS, loss=case.our_options),
        seed=SEED,
        num_steps=NUM_STEPS,
        pairs_per_epoch=len(pairs),
        me=Rank(0, 1, torch.device("cpu")),
        steps_from=steps_from,
        held_out=None,
        checkpoints=NoCheckpoints(),
        export_to=Location.of(folder / "ours" / "model"),
        resume=None,
        require_reference=partial(require_same_start, Tolerance().limits("float32")),
    )
    print(f"ours, {case.loss}: {time.monotonic() - began:.0f} s", flush=True)
    return [{"step": entry["step"], **{name: entry[name] for name in METRICS}} for entry in state.history]


# TRL's side


def run_trl(folder: Path, cases: Sequence[Case]) -> None:
    """Train with TRL's DPOTrainer; in the environment of requirements-trl.txt."""
    from datasets import Dataset

    setting = json.loads((folder / "setting.json").read_text())
    # One dataset for all cases: TRL then computes the reference log-probs once.
    dataset = Dataset.from_list(read_lines(folder / "pairs.jsonl"))
    write_json(folder / "trl" / "environment.json", environment(TRL_PACKAGES))
    for case in cases:
        write_lines(folder / "trl" / f"{case.loss}.jsonl", _train_trl(setting["model"], dataset, case, folder))
        if case.loss == RECUT:
            again = _train_trl(setting["model"], dataset, case, folder, pad_to_multiple_of=MAX_TOKENS)
            write_lines(folder / "trl" / f"{case.loss}.recut.jsonl", again)


def _train_trl(model: str, dataset: Any, case: Case, folder: Path, pad_to_multiple_of: int | None = None) -> Steps:
    """Metrics of each step, with the log-probs of its completions: first the batch's chosen, then its rejected."""
    from transformers import AutoTokenizer

    began = time.monotonic()
    trainer = token_ids_trainer()(
        model=model,
        args=dpo_config(
            folder / "trl" / "trainer",
            loss_type=[case.loss],
            beta=case.beta,
            label_smoothing=case.label_smoothing,
            precompute_ref_log_probs=True,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=NUM_STEPS,
            pad_to_multiple_of=pad_to_multiple_of,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    policy_logps: list[list[float]] = []
    trainer.model.register_forward_hook(
        lambda _module, _inputs, output: policy_logps.append(output.log_probs.double().sum(1).tolist())
    )
    trainer.train()
    print(f"TRL, {case.loss}: {time.monotonic() - began:.0f} s", flush=True)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    scored = trainer.train_dataset
    chosen, rejected = list(scored["ref_chosen_logps"]), list(scored["ref_rejected_logps"])
    steps = []
    for number, entry in enumerate(history):
        batch = slice(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
        logps = {"policy_logps": policy_logps[number], "reference_logps": chosen[batch] + rejected[batch]}
        steps.append({"step": entry["step"], **{name: entry[name] for name in METRICS}, **logps})
    return steps


# The comparison


def by_hand(case: Case, logged: dict[str, Any], lengths: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Loss and rewards of a step in float64, from the log-probs of its completions and their token counts.

    The rewards are those whose margin the loss sees; below "summed/" those of sums, as TRL logs them for every loss.
    """
    policy, reference = logged["policy_logps"], logged["reference_logps"]
    ratios = [p - r for p, r in zip(policy, reference, strict=True)]
    losses, chosen_rewards, rejected_rewards, summed_chosen, summed_rejected = [], [], [], [], []
    for number, (chosen_tokens, rejected_tokens) in enumerate(lengths):
        chosen, rejected = ratios[number], ratios[len(lengths) + number]
        summed_chosen.append(case.beta * chosen)
        summed_rejected.append(case.beta * rejected)
        if case.per_token:
            chosen, rejected = chosen / chosen_tokens, rejected / rejected_tokens
        chosen_rewards.append(case.beta * chosen)
        rejected_rewards.append(case.beta * rejected)
        losses.append(_loss_by_hand(case, chosen, rejected))
    return (
        {"loss": _mean(losses)}
        | _rewards("", chosen_rewards, rejected_rewards)
        | _rewards("summed/", summed_chosen, summed_rejected)
    )


def _loss_by_hand(case: Case, chosen: float, rejected: float) -> float:
    """The loss of one pair from its log-ratios, as the table of the papers' formulas has it."""
    beta, epsilon, h = case.beta, case.label_smoothing, chosen - rejected
    match case.loss:
        case "sigmoid" | "sigmoid_norm":
            return _minus_log_sigmoid(beta * h)
        case "ipo":
            return (h - 1 / (2 * beta)) ** 2
        case "hinge":
            return max(0.0, 1 - beta * h)
        case "robust":
            kept, flipped = _minus_log_sigmoid(beta * h), _minus_log_sigmoid(-beta * h)
            return ((1 - epsilon) * kept - epsilon * flipped) / (1 - 2 * epsilon)
        case "apo_zero":
            return 1 - 1 / (1 + math.exp(-beta * chosen)) + 1 / (1 + math.exp(-beta * rejected))
    raise ValueError(f"there is no formula by hand for {case.loss}")


def _minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def _rewards(prefix: str, chosen: list[float], rejected: list[float]) -> dict[str, float]:
    return {
        f"{prefix}rewards/chosen": _mean(chosen),
        f"{prefix}rewards/rejected": _mean(rejected),
        f"{prefix}rewards/margins": _mean(chosen) - _mean(rejected),
        f"{prefix}rewards/accuracies": _mean([float(w > other) for w, other in zip(chosen, rejected, strict=True)]),
    }


@dataclass(frozen=True)
class Difference:
    """How far two runs of NUM_STEPS steps lie apart; each value is the largest of the steps, unless stated."""

    loss: float
    """|Δloss|."""
    mean_loss: float
    """Mean of Δloss, with its sign: a drift to one side."""
    relative_loss: float
    """|Δloss| / max(1, loss)."""
    grad_norm: float
    """|Δgrad_norm| / grad_norm."""
    reward: float
    """|Δ| of rewards/chosen, rejected and margins."""
    accuracy_steps: int
    """Steps with other rewards/accuracies."""


def difference(one: Steps, other: Steps, reward_prefix: str = "") -> Difference:
    """Of two runs; `reward_prefix` goes before the names of the other one's rewards."""
    if [step["step"] for step in one] != list(range(1, NUM_STEPS + 1)) or len(one) != len(other):
        sys.exit(
            f"A run must have the steps 1 to {NUM_STEPS}; found {len(one)} and {len(other)}. Run both sides again."
        )
    both = list(zip(one, other, strict=True))
    losses = [a["loss"] - b["loss"] for a, b in both]
    accuracies = "rewards/accuracies"
    return Difference(
        loss=max(map(abs, losses)),
        mean_loss=_mean(losses),
        relative_loss=max(abs(d) / max(1.0, abs(b["loss"])) for d, (_, b) in zip(losses, both, strict=True)),
        grad_norm=max(abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"] for a, b in both),
        reward=max(abs(a[name] - b[reward_prefix + name]) for a, b in both for name in REWARDS),
        accuracy_steps=sum(a[accuracies] != b[reward_prefix + accuracies] for a, b in both),
    )


def compare(folder: Path, cases: Sequence[Case]) -> list[str]:
    """Print the tables. Returns what exceeds its tolerance."""
    exceeded = []
    logged_rows, hand_rows, noise_rows = [], [], []
    lengths = [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in read_lines(folder / "pairs.jsonl")]
    for case in cases:
        ours = read_lines(folder / "ours" / f"{case.loss}.jsonl")
        trl = read_lines(folder / "trl" / f"{case.loss}.jsonl")
        hand = [
            step | by_hand(case, step, lengths[number * BATCH_SIZE : (number + 1) * BATCH_SIZE])
            for number, step in enumerate(trl)
        ]
        logged = difference(ours, trl)
        ours_by_hand, trl_by_hand = difference(ours, hand), difference(trl, hand, reward_prefix="summed/")
        name = f"{case.loss}, β {case.beta:g}" + (f", ε {case.label_smoothing:g}" if case.label_smoothing else "")
        reward = f"{logged.reward:.1e}" + (" (other definition)" if case.per_token else "")
        logged_rows.append(
            [name, f"{trl[0]['loss']:.4f} → {trl[-1]['loss']:.4f}", *_cells(logged), reward, f"{logged.accuracy_steps}"]
        )
        hand_rows.append(
            [
                name,
                f"{ours_by_hand.loss:.1e}",
                f"{trl_by_hand.loss:.1e}",
                f"{ours_by_hand.reward:.1e}",
                f"{trl_by_hand.reward:.1e}",
                f"{difference(trl, hand).reward:.1e}",
            ]
        )
        checks = {
            "loss": (logged.relative_loss, LOSS_TOLERANCE),
            "grad_norm": (logged.grad_norm, GRAD_NORM_TOLERANCE),
            "our rewards against those by hand, over β": (ours_by_hand.reward / case.beta, REWARD_TOLERANCE),
            "TRL's rewards against sums by hand, over β": (trl_by_hand.reward / case.beta, REWARD_TOLERANCE),
            "our loss against that by hand": (ours_by_hand.relative_loss, LOSS_TOLERANCE),
            "TRL's loss against that by hand": (trl_by_hand.relative_loss, LOSS_TOLERANCE),
        }
        if not case.per_token:
            checks["rewards, over β"] = (logged.reward / case.beta, REWARD_TOLERANCE)
        exceeded += [
            f"{case.loss}: {what} differs by {value:.2e}, more than {limit:g}"
            for what, (value, limit) in checks.items()
            if not value <= limit
        ]
        if case.loss == RECUT:
            for name, side, first, layout in (
                ("ours", "ours", ours, "a pair a micro-batch"),
                ("TRL", "trl", trl, f"padded to {MAX_TOKENS}"),
            ):
                found = difference(read_lines(folder / side / f"{case.loss}.recut.jsonl"), first)
                noise_rows.append([f"{name}, {layout}, against itself", *_cells(found), f"{found.reward:.1e}"])
    losses = ["max abs. Δloss", "mean Δloss", "max rel. Δgrad_norm", "max abs. Δreward"]
    print(_heading(folder))
    print(f"\nOurs against TRL, as both log it, over {NUM_STEPS} steps:\n")
    print(table(["loss", "TRL's loss, first → last step", *losses, "steps with other accuracies"], logged_rows))
    print("\nAgainst the formula in float64 on TRL's log-probs, max abs. Δ:\n")
    sides = ["loss, ours", "loss, TRL", "rewards, ours", "rewards, TRL, of sums", "rewards, TRL, as the loss sees them"]
    print(table(["loss", *sides], hand_rows))
    if noise_rows:
        print(f"\nEach side's own noise, {RECUT}:\n")
        print(table(["run", *losses], noise_rows))
    return exceeded


def _cells(found: Difference) -> list[str]:
    return [f"{found.loss:.1e}", f"{found.mean_loss:+.1e}", f"{found.grad_norm:.1e}"]


def _heading(folder: Path) -> str:
    setting = json.loads((folder / "setting.json").read_text())
    ours, trl = (json.loads((folder / side / "environment.json").read_text()) for side in ("ours", "trl"))
    rows = read_lines(folder / "pairs.jsonl")
    tokens = [longest(row) for row in rows]
    return (
        f"{len(rows)} pairs ({setting['source']}), {min(tokens)} to {max(tokens)} tokens; {BATCH_SIZE} a step; "
        f"float32; AdamW, learning rate {LEARNING_RATE:g}, constant.\n"
        f"Versions, ours / TRL: {versions(ours, trl)}.\n"
        f"{ours['hardware']}; commit {ours['commit']}."
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", choices=["pairs", "ours", "trl"], help="run this part only")
    parser.add_argument("--compare", action="store_true", help="only compare what both sides wrote")
    parser.add_argument("--losses", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "trl_parity", help="where the parts meet")
    parser.add_argument("--trl-python", default=os.environ.get("TRL_PYTHON"), help="Python of TRL's environment")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    folder, cases = arguments.folder, [CASES[name] for name in arguments.losses]
    match arguments.side:
        case "pairs":
            write_pairs(folder)
        case "ours":
            run_ours(folder, cases)
        case "trl":
            run_trl(folder, cases)
    if arguments.side is not None:
        return
    if not arguments.compare:
        if arguments.trl_python is None:
            parser.error("name the Python of TRL's environment with --trl-python, or run the parts with --side")
        same = ["--folder", str(folder), "--losses", *arguments.losses]
        for python, side in ((sys.executable, "pairs"), (sys.executable, "ours"), (arguments.trl_python, "trl")):
            subprocess.run([python, "-m", "benchmarks.trl_parity", "--side", side, *same], check=True)
    exceeded = compare(folder, cases)
    if exceeded:
        sys.exit("\n".join(["", "Over the tolerance:", *exceeded]))


if __name__ == "__main__":
    main()
