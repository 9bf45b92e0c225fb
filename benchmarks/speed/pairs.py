"""The pairs as data: which are taken, in which order, and how many tokens they have."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.record import Rows
from benchmarks.side_by_side import SEED, longest

Lengths = tuple[int, int, int]
"""Tokens of a pair's prompt, chosen and rejected completion."""


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
