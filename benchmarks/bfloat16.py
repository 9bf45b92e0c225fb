"""What bfloat16 does to log-probs and to a training step, against float32 on the same pairs: noise, or a fault?

    DPO_RAY_DATA=… python -m benchmarks.bfloat16

A model is scored, trained for one step of 4 pairs, and scored again, in float32, in bfloat16 as the trainer computes it
(layers in bfloat16, weights in float32), and in float32 weights under autocast. Reference log-probs are those of the
same way of computing. A fault would show as a bias, over many pairs; noise as a spread around it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import statistics
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

from benchmarks.record import OUR_PACKAGES, environment, table, versions
from benchmarks.side_by_side import LEARNING_RATE, MODEL, SEED, longest, preference_pairs, token_ids, train_options
from dpo_ray.losses.pair_logps import sum_by_sequence
from dpo_ray.model.folders import load_tokenizer
from dpo_ray.model.policy import CompletionScorer, load_policy, torch_dtype
from dpo_ray.model.resolve import resolve
from dpo_ray.pairs import TokenizedPair
from dpo_ray.training.optim import make_optimizer
from dpo_ray.training.parallel import Rank, forget_gathered, parallelize

BETA = 0.1
BATCH = 4
WAYS = ("float32", "bfloat16", "autocast")
AGAIN = "bfloat16, a pair at a time"


@dataclass(frozen=True)
class Scores:
    """Of all pairs: log-probs of the tokens, in order, and their sums by completion, [2 · pairs]; in nats."""

    tokens: torch.Tensor
    sums: torch.Tensor

    def margins(self, reference: Scores) -> torch.Tensor:
        """log-ratio of chosen minus that of rejected, [pairs]."""
        ratios = self.sums - reference.sums
        return ratios[0::2] - ratios[1::2]


Found = tuple[Scores, Scores | None, float]
"""Scores before the step and after it, and the gradient's norm in it."""


class Way:
    """A model that is computed in one way."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.scorer = CompletionScorer(load_policy(folder)).train()
        dtype = torch_dtype("float32" if name == "autocast" else name)
        self.forward = parallelize(self.scorer, "ddp", Rank(0, 1, torch.device("cpu")), dtype)
        self.optimizer = make_optimizer(self.scorer.model, train_options(BATCH, 1, {"type": "sigmoid", "beta": BETA}))

    def _context(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.name == "autocast" else nullcontext()

    @torch.no_grad()
    def score(self, pairs: Sequence[TokenizedPair], size: int = BATCH) -> Scores:
        tokens, sums = [], []
        for some in _batched(pairs, size):
            batch = self.scorer.collate(list(some))
            with self._context():
                values = self.scorer(batch).logprobs
            tokens.append(values)
            sums.append(sum_by_sequence(values, batch.sequence_index, 2 * batch.num_pairs))
        forget_gathered(self.forward)
        return Scores(torch.cat(tokens), torch.cat(sums))

    def step(self, pairs: Sequence[TokenizedPair], reference: Scores) -> float:
        """One update; returns the gradient's norm."""
        batch = self.scorer.collate(list(pairs))
        with self._context():
            values = self.forward(batch).logprobs
        sums = sum_by_sequence(values, batch.sequence_index, 2 * batch.num_pairs) - reference.sums
        (-logsigmoid(BETA * (sums[0::2] - sums[1::2]))).mean().backward()
        norm = math.sqrt(sum(float(_whole(p.grad).square().sum()) for p in self.scorer.parameters()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def _whole(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).double()


def _batched(pairs: Sequence[TokenizedPair], size: int) -> list[Sequence[TokenizedPair]]:
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="hh_helpful", help="set in the folder that DPO_RAY_DATA names")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--max-tokens", type=int, default=512, help="of the prompt and its longer completion")
    arguments = parser.parse_args()
    if "DPO_RAY_DATA" not in os.environ:
        sys.exit("DPO_RAY_DATA must name the folder of real data.")
    folder = resolve(MODEL)
    trained, pairs = _pairs(arguments, folder)
    found: dict[str, Found] = {}
    for name in WAYS:
        way = Way(name, folder)
        reference, start = way.score(trained), way.score(pairs)
        again = way.score(pairs, 1) if name == "bfloat16" else None
        norm = way.step(trained, reference)
        found[name] = (start, way.score(pairs), norm)
        if again is not None:
            found[AGAIN] = (again, None, math.nan)
        print(f"{name}: done", flush=True)
    _report(arguments, found, len(pairs))


def _pairs(arguments: argparse.Namespace, folder: Path) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    rows = list(preference_pairs(Path(os.environ["DPO_RAY_DATA"]) / arguments.data))
    random.Random(SEED).shuffle(rows)
    tokenizer = load_tokenizer(folder)
    fitting = (r for r in (token_ids(tokenizer, row) for row in rows) if longest(r) <= arguments.max_tokens)
    pairs = [
        TokenizedPair(str(n), row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        for n, row in enumerate(itertools.islice(fitting, BATCH + arguments.pairs))
    ]
    return pairs[:BATCH], pairs[BATCH:]


def _report(arguments: argparse.Namespace, found: dict[str, Found], num_pairs: int) -> None:
    about = environment(OUR_PACKAGES)
    print(f"\n{versions(about)}; {about['hardware']}; commit {about['commit']}.")
    exact_start, exact_end, _ = found["float32"]
    assert exact_end is not None
    print(f"{num_pairs} pairs of {arguments.data}, {len(exact_start.tokens)} completion tokens; β {BETA:g}.\n")
    rows = []
    for name, (start, _, _) in found.items():
        apart = (start.tokens - exact_start.tokens).double()
        margins = start.margins(exact_start).double()
        rows.append([name, _mean(apart), f"{float(apart.std()):.4f}", _mean(margins), f"{float(margins.std()):.3f}"])
    print("Before training, against float32, in nats:\n")
    head = ["computed in", "token log-prob, mean Δ ± s.e.", "its s.d.", "margin, mean Δ ± s.e.", "its s.d."]
    print(table(head, rows))
    exact = -logsigmoid(BETA * exact_end.margins(exact_start)).double()
    rows = []
    for name in WAYS:
        start, end, norm = found[name]
        assert end is not None
        losses = -logsigmoid(BETA * end.margins(start)).double()
        batches = [statistics.mean(b.tolist()) for b in (losses - exact).split(BATCH)]
        spread = f"{statistics.stdev(batches):.4f}, {max(map(abs, batches)):.4f}"
        rows.append([name, f"{norm:.3f}", f"{float(losses.mean()):.4f}", _mean(losses - exact), spread])
    print(f"\nAfter one step of {BATCH} other pairs at a learning rate of {LEARNING_RATE:g}:\n")
    head = ["computed in", "gradient norm of the step", "mean loss", "mean Δ to float32 ± s.e."]
    print(table([*head, f"Δ of means over {BATCH} pairs: s.d., largest"], rows))


def _mean(values: torch.Tensor) -> str:
    return f"{float(values.mean()):+.5f} ± {float(values.std()) / math.sqrt(len(values)):.5f}"


if __name__ == "__main__":
    main()
