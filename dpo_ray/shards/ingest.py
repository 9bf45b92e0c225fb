"""Raw rows → canonical pairs, a part of a file at a time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from dpo_ray.config import Columns, Data, Pairing
from dpo_ray.config.losses import Judged
from dpo_ray.data.canonical import canonical_pairs
from dpo_ray.data.quarantine import quarantine_table, quarantined
from dpo_ray.data.raw.json_lines import Unreadable
from dpo_ray.data.raw.parts import RawPart
from dpo_ray.data.raw.read import read_rows
from dpo_ray.data.rules import BadRow, check_length, known_reason, reject
from dpo_ray.formats.format import Format, NoPair
from dpo_ray.formats.joined import joined
from dpo_ray.formats.registry import formats, renamed
from dpo_ray.pairs import PAIRS, PreferencePair, Split, pair_row, split_of
from dpo_ray.shards.output import ShardOutput

VERSION = 5
"""Of what becomes of a raw row, here, in dpo_ray.formats and in dpo_ray.data; raised when that changes, and all shards
are made again."""


def identity(data: Data, seed: int) -> dict[str, Any]:
    """The options that change the pairs, but for those that a shard's own content tells: its format and its pairing."""
    held_out_by_hash = data.eval is None
    return {
        "held_out_fraction": data.held_out_fraction if held_out_by_hash else None,
        "seed": seed if held_out_by_hash else None,
        "rules": VERSION,
        "columns": PAIRS.names,
        "renamed": data.columns.renamed(),
        "ignore": sorted(data.ignore),
        "ties": data.ties,
        "max_characters": data.max_characters,
    }


@dataclass(frozen=True)
class RawShard:
    """Rows of a raw file, and what they are."""

    rows: RawPart
    format: str
    """Its name."""
    split: Split | None
    """The side that they are all on; None: the hash of its prompt decides for each."""
    before: RawPart | None = None
    """The part before; only of a format that joins rows."""
    after: tuple[RawPart, ...] = ()
    """The parts after, with as many rows as may be joined, or to the end; likewise."""
    source: str | None = None
    """The source of a mixture that they are of."""
    limit: int | None = None
    """Only the first so many; of a format that joins rows, of those that it makes of them."""


class IngestShard:
    """Raw rows → canonical pairs, in order; bad rows → quarantine with the reason.

    A row with more than `max_characters` is bad.
    """

    def __init__(
        self,
        held_out_fraction: float,
        seed: int,
        columns: Columns = Columns(),
        pairing: Pairing = Pairing(),
        max_characters: int | None = None,
        ignore: Collection[Judged] = (),
        ties: Literal["drop", "keep"] = "drop",
    ):
        self.held_out_fraction = held_out_fraction
        self.seed = seed
        self.names = columns.renamed()
        self.ignore = frozenset(ignore)
        self.ties = ties
        self.pairing = pairing
        self.max_characters = max_characters

    def __call__(self, source: RawShard) -> ShardOutput:
        return self.of_rows(self.rows(source), source)

    def rows(self, source: RawShard) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
        """The rows of a source with their numbers; joined, where the format joins rows, which then count as one."""
        columns, joins = self.columns(source.format), formats()[source.format].joins
        rows = read_rows(source.rows, columns)
        if joins is None:
            return rows
        before = read_rows(source.before, columns) if source.before is not None else ()
        after = itertools.chain.from_iterable(read_rows(part, columns) for part in source.after)
        return joined(rows, self.names.get(joins, joins), before, after)

    def columns(self, name: str) -> set[str]:
        """The columns that are read of files of this format, as they are called there."""
        return {self.names.get(column, column) for column in formats()[name].reads if column not in self.ignore}

    def of_rows(self, rows: Iterable[tuple[int, dict[str, Any] | Unreadable]], source: RawShard) -> ShardOutput:
        """The pairs of some rows of a source, with their numbers."""
        format_ = formats()[source.format]
        kept, bad, counters = [], [], Counter[str](read=0)
        for number, row in itertools.islice(rows, source.limit):
            counters["read"] += 1
            try:
                pairs = self._pairs(row, format_)
            except BadRow as error:
                counters[error.reason] += 1
                raw = row.raw if isinstance(row, Unreadable) else row
                bad.append(quarantined(source.rows.file, number, error.reason, raw))
                continue
            if len(pairs) > 1:
                counters["more_pairs"] += len(pairs) - 1
            for pair in pairs:
                split = source.split or split_of(pair.prompt_id, self.held_out_fraction, self.seed)
                kept.append(pair_row(pair, split, source.source))
        return ShardOutput(pa.Table.from_pylist(kept, schema=PAIRS), counters, quarantine_table(bad))

    def _pairs(self, row: dict[str, Any] | Unreadable, format_: Format) -> list[PreferencePair]:
        if isinstance(row, Unreadable):
            reject(row.reason)
        wanted = set(format_.reads) - self.ignore
        named = {name: value for name, value in renamed(row, self.names).items() if name in wanted}
        if self.max_characters is not None:
            check_length(named, self.max_characters)
        try:
            fields = format_.row(named)
        except NoPair as error:
            reject(known_reason(error.reason))
        return canonical_pairs(fields, format_.layout, self.pairing, self.ties)
