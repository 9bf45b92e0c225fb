"""Raw rows → canonical pairs, a part of a file at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import pyarrow as pa

from dpo_ray.config import Columns, Data, Pairing
from dpo_ray.config.layouts import Layout, fields_of
from dpo_ray.config.losses import Judged
from dpo_ray.data.canonical import canonical_pairs
from dpo_ray.data.quarantine import quarantine_table, quarantined
from dpo_ray.data.raw.json_lines import Unreadable
from dpo_ray.data.raw.parts import RawPart
from dpo_ray.data.raw.read import read_rows
from dpo_ray.data.rules import BadRow, check_length, reject
from dpo_ray.pairs import PAIRS, PreferencePair, Split, pair_row, split_of
from dpo_ray.shards.output import ShardOutput

VERSION = 1
"""Of what becomes of a raw row, here and in dpo_ray.data; raised when that changes, and all shards are made again."""


def identity(data: Data, seed: int) -> dict[str, Any]:
    """The options that change the pairs, but for those that a shard's own content tells: its layout and its pairing."""
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
    layout: Layout
    split: Split | None
    """The side that they are all on; None: the hash of its prompt decides for each."""
    source: str | None = None
    """The source of a mixture that they are of."""
    limit: int | None = None
    """Only the first so many."""


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
        self.columns = {field: column for field, column in columns.in_files().items() if field not in ignore}
        self.ties = ties
        self.pairing = pairing
        self.max_characters = max_characters

    def __call__(self, source: RawShard) -> ShardOutput:
        fields = {f: self.columns[f] for f in fields_of(source.layout) if f in self.columns}
        kept, bad, counters = [], [], Counter[str]()
        for number, row in islice(read_rows(source.rows, set(fields.values())), source.limit):
            counters["read"] += 1
            try:
                pairs = self._pairs(row, source.layout, fields)
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

    def _pairs(self, row: dict[str, Any] | Unreadable, layout: Layout, fields: dict[str, str]) -> list[PreferencePair]:
        if isinstance(row, Unreadable):
            reject(row.reason)
        named = {field: row[column] for field, column in fields.items() if column in row}
        if self.max_characters is not None:
            check_length(named, self.max_characters)
        return canonical_pairs(named, layout, self.pairing, self.ties)
