"""Rows as a data set's card has them: columns and types, also those that are not read, nulls; and their pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.config import Columns, Pairing
from dpo_ray.data.raw.parts import RawPart
from dpo_ray.data.raw.scan import peek
from dpo_ray.formats.format import Format
from dpo_ray.formats.registry import recognise
from dpo_ray.pairs import plain
from dpo_ray.shards.ingest import IngestShard, RawShard
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.location import Location

Pair = tuple[list[dict[str, str]], str | None, str | None]
"""Prompt, chosen, rejected."""
TEXT, MESSAGES = pa.string(), pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))


@dataclass(frozen=True)
class Card:
    """A data set."""

    source: str
    """What it is called where it is published."""
    types: dict[str, pa.DataType]
    rows: list[dict[str, Any]]
    pairs: list[Pair]
    """Of the rows, one pair each at most."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason → rows."""

    def __str__(self) -> str:
        return self.source


def said(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """A dialogue that the user begins."""
    roles = ("user", "assistant")
    found = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return found if system is None else [{"role": "system", "content": system}, *found]


def write(card: Card, path: Path) -> Path:
    """The rows as a file of the kind that its name tells."""
    table = pa.Table.from_pylist(card.rows, schema=pa.schema(list(card.types.items())))
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        case ".json":
            path.write_text(json.dumps(table.to_pylist(), indent=2))
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in card.rows))
        case other:
            raise AssertionError(other)
    return path


def format_of(path: Path, names: dict[str, str] | None = None, option: str = "auto") -> Format:
    """What a file is taken for."""
    found = peek(Location.of(path))
    return recognise(found.columns, found.sample, path.name, option=option, names=names or {})


def ingested(path: Path, name: str, columns: Columns = Columns()) -> ShardOutput:
    return IngestShard(0.0, 0, columns, Pairing())(RawShard(RawPart(str(path)), name, None))


def pairs_of(output: ShardOutput) -> list[Pair]:
    return [(plain(row["prompt"]), row["chosen"], row["rejected"]) for row in output.table.to_pylist()]


def check(
    card: Card, name: str, folder: Path, suffixes: Sequence[str] = (".parquet", ".jsonl", ".json", ".arrow")
) -> None:
    """The card's file is taken for this format, whatever kind it is of, and becomes the pairs that the card tells."""
    for suffix in suffixes:
        path = write(card, folder / f"rows{suffix}")
        assert format_of(path).name == name, suffix
        output = ingested(path, name)
        assert pairs_of(output) == card.pairs, suffix
        assert output.counters == {"read": len(card.rows), **card.dropped}, suffix
