"""Items in their order, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def batches(items: Iterable[Item], size_of: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Batches of at most `limit` in all; an item that is larger is a batch of its own."""
    batch: list[Item] = []
    total = 0
    for item in items:
        size = size_of(item)
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


def split_up(groups: list[list[int]], tokens: np.ndarray, count: int) -> list[list[int]]:
    """The groups cut in halves, the largest first, until there are `count`; empty ones where no pair is left to cut.

    tokens: [n] tokens of each item.
    """
    groups = list(groups)
    while len(groups) < count:
        largest = max((g for g in groups if len(g) > 1), key=lambda g: int(tokens[g].sum()), default=[])
        if largest:
            groups.remove(largest)
            groups += [largest[0::2], largest[1::2]]
        else:
            groups.append([])
    return groups


def spread(costs: np.ndarray, num_ranks: int) -> list[list[int]]:
    """Longest processing time first: items → ranks, nearly equal in cost. Deterministic."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        shares[rank].append(item)
        loads[rank] += float(costs[item])
    return shares


def first_fit(tokens: Sequence[int] | np.ndarray, limit: int) -> list[list[int]]:
    """First fit, longest first: items → groups of at most `limit` tokens; a longer item has a group of its own."""
    groups: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(tokens)), key=lambda i: (-int(tokens[i]), i)):
        size = int(tokens[item])
        for g, left in enumerate(room):
            if size <= left:
                groups[g].append(item)
                room[g] -= size
                break
        else:
            groups.append([item])
            room.append(limit - size)
    return groups
