"""The runs of benchmarks.speed as data: their common setting, where they are kept, their pairs and their speed."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import MODEL, SEED, Rows, longest, write_json
from benchmarks.speed.flops import Lengths

DATA = ("hh_helpful", "tldr_human", "generated")
DTYPES = ("float32", "bfloat16")
OURS, DEFAULT, TUNED = "ours", "trl-default", "trl-tuned"
ROWS = (OURS, DEFAULT, "trl-fair", TUNED)
BUSY = 0.7
"""Cores that others use at a run's start, above which the report marks it."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a folder have in common."""

    model: str = MODEL
    random_llama: str | None = None
    device: str = "auto"
    threads: int = 0
    steps: int = 6
    pairs_per_step: int = 4
    max_tokens: int = 1024
    tokens_per_microbatch: int | None = None
    trl_batch_sizes: Sequence[int] = (2, 4, 8)

    def __post_init__(self) -> None:
        odd = [b for b in self.trl_batch_sizes if b < self.pairs_per_step and self.pairs_per_step % b]
        if odd:
            sys.exit(f"--trl-batch-sizes {odd} do not divide --pairs-per-step {self.pairs_per_step}.")
        if self.steps < 2:
            sys.exit("--steps must be 2 or more: the first one is a warm-up.")

    @property
    def microbatch_tokens(self) -> int:
        """--tokens-per-microbatch, or what the product takes by itself where memory is not short."""
        import torch

        from dpo_ray.training.memory import MOST_TOKENS_CPU, MOST_TOKENS_GPU

        on_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return self.tokens_per_microbatch or (MOST_TOKENS_GPU if on_gpu else MOST_TOKENS_CPU)


def settled(folder: Path, given: Mapping[str, Any]) -> Setting:
    """The folder's setting, or, of a new folder, the defaults with what was given. Ends where the two disagree."""
    path = folder / "setting.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        other = [f"{name} {kept[name]}" for name, value in given.items() if kept[name] != value]
        if other:
            sys.exit(f"The runs in {folder} have {', '.join(other)}. Name another --folder, or remove this one.")
        return Setting(**kept)
    setting = Setting(**{"threads": len(os.sched_getaffinity(0)), **given})
    write_json(path, asdict(setting))
    return setting


@dataclass(frozen=True)
class Place:
    """One data set and dtype of a folder."""

    folder: Path
    data: str
    dtype: str

    @property
    def pairs(self) -> Path:
        return self.folder / self.data / "pairs.jsonl"

    @property
    def probe(self) -> Path:
        return self.folder / self.data / self.dtype / "probe.json"

    @property
    def gemm(self) -> Path:
        return self.folder / self.data / self.dtype / "gemm.json"

    def run(self, row: str, repeat: int) -> Path:
        """Where a finished run is kept."""
        return self.folder / self.data / self.dtype / f"{row}.{repeat}.json"

    def runs(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Row → repeat → what is finished, in the order of ROWS."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for row in ROWS:
            for path in sorted(self.run(row, 0).parent.glob(f"{row}.*.json")):
                found.setdefault(row, {})[int(path.name.split(".")[1])] = json.loads(path.read_text())
        return found


# The pairs


def select(rows: Iterable[dict[str, Any]], count: int, max_tokens: int) -> Rows:
    """The first `count` rows whose prompt and longer completion have at most `max_tokens` tokens."""
    chosen: Rows = []
    for row in rows:
        if longest(row) <= max_tokens:
            chosen.append(row)
        if len(chosen) == count:
            return chosen
    sys.exit(f"Only {len(chosen)} pairs have at most {max_tokens} tokens; {count} are needed.")


def generated_pairs(vocabulary: int, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """Endless pairs of random tokens, in lengths like those of HH: medians of 150, 45 and 45 tokens, log-normal."""
    dice = random.Random(seed)
    while True:
        sizes = (dice.lognormvariate(math.log(median), 0.7) for median in (150, 45, 45))
        yield fixed_pair(dice, vocabulary, [max(1, round(size)) for size in sizes])


def fixed_pair(dice: random.Random, vocabulary: int, sizes: Sequence[int]) -> dict[str, Any]:
    """A pair of random tokens with these P, C and R."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {name: dice.choices(range(vocabulary), k=size) for name, size in zip(names, sizes, strict=True)}


def by_length(rows: Rows) -> Rows:
    """Longest first, so that memory is claimed once; ties in their order."""
    return sorted(rows, key=longest, reverse=True)


def repeated(rows: Rows, count: int) -> Rows:
    """The rows again and again, `count` of them."""
    return [rows[i % len(rows)] for i in range(count)]


def middle(rows: Rows, count: int) -> Rows:
    """`count` neighbours from the middle, or all where there are fewer."""
    first = max(0, (len(rows) - count) // 2)
    return rows[first : first + count]


def lengths_of(row: dict[str, Any]) -> Lengths:
    """P, C and R."""
    return len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])


def real_tokens(rows: Rows) -> int:
    """2P + C + R of each pair: what its two completions with their prompts have, the same count for every trainer."""
    return sum(2 * p + c + r for p, c, r in map(lengths_of, rows))


def shared_tokens(rows: Rows) -> int:
    """P + C + R of each pair."""
    return sum(sum(lengths_of(row)) for row in rows)


def padded_tokens(rows: Rows, batch_size: int) -> int:
    """Tokens with padding where each completion has a row of its own, as wide as the batch's longest."""
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return sum(2 * len(batch) * max(map(longest, batch)) for batch in batches)


# What they measured


@dataclass(frozen=True)
class Speed:
    """Of the measured steps of a run, all together."""

    wall: float
    cpu: float
    pairs: int
    tokens: int
    mean_loss: float
    """Over pairs."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.wall


def speed(run: Mapping[str, Any]) -> Speed:
    """Of a run as it is kept; its warm-up does not count."""
    steps = [step for step in run["steps"] if not step["warm_up"]]
    pairs = sum(step["pairs"] for step in steps)
    return Speed(
        wall=sum(step["wall"] for step in steps),
        cpu=sum(step["cpu"] for step in steps),
        pairs=pairs,
        tokens=sum(step["tokens"] for step in steps),
        mean_loss=sum(step["loss"] * step["pairs"] for step in steps) / pairs,
    )
