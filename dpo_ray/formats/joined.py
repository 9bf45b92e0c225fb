"""Rows that follow each other with the same prompt, an answer each → one row with lists.

A file is read in parts. Such rows belong to the part that the first of them lies in, so that they are the same however
the file is cut.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Numbered = tuple[int, Any]
"""A row with its number. What is no mapping stands for a row that cannot be read, and is by itself."""

LARGEST = 64
"""Of more rows with the same prompt the first so many are taken."""


def joined(
    rows: Iterable[Numbered], column: str, before: Iterable[Numbered] = (), after: Iterable[Numbered] = ()
) -> Iterator[Numbered]:
    """The joined rows that begin in `rows`, each with the number of the first of its rows.

    Args:
        column: whose value the rows share that are joined.
        before: what comes before the rows; the last one tells whether their first ones belong to it.
        after: what follows them, LARGEST rows or all; read only as far as the last of them goes on.
    """
    [last] = collections.deque((row for _, row in before), maxlen=1) or [None]
    own = _skipped(iter(rows), last, column)
    group: list[Numbered] = []
    for numbered in own:
        if group and not _same(group[0][1], numbered[1], column):
            yield _one(group, column)
            group = []
        if len(group) < LARGEST:
            group.append(numbered)
    if group:
        first = group[0][1]
        more = itertools.takewhile(lambda numbered: _same(first, numbered[1], column), after)
        yield _one([*group, *itertools.islice(more, LARGEST - len(group))], column)


def _skipped(rows: Iterator[Numbered], last: Any, column: str) -> Iterator[Numbered]:
    return itertools.dropwhile(lambda numbered: _same(last, numbered[1], column), rows)


def _same(one: Any, other: Any, column: str) -> bool:
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    return one.get(column) is not None and one.get(column) == other.get(column)


def _one(group: list[Numbered], column: str) -> Numbered:
    number, first = group[0]
    if not isinstance(first, Mapping):
        return number, first
    names = dict.fromkeys(name for _, row in group for name in row)
    return number, {
        name: first.get(column) if name == column else [row.get(name) for _, row in group] for name in names
    }
