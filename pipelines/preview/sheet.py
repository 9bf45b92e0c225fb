"""Files of preferences → what is found in them: formats, columns, what would be dropped, and a few rows in tokens.

In one process and without Ray. Duplicates are not looked for, for they are told over all rows together.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_ray.config import Config
from dpo_ray.data.duplicates import PairsShard
from dpo_ray.data.raw.parts import RawPart
from dpo_ray.data.raw.scan import FileRecord, Peek, map_files, peek
from dpo_ray.data.rules import REASONS
from dpo_ray.data.tally import NOTED
from dpo_ray.formats.format import Format
from dpo_ray.pairs import answer_of, plain
from dpo_ray.shards.ingest import RawShard
from dpo_ray.shards.output import ShardOutput
from dpo_ray.shards.tokenize import TokenizeShard
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location
from pipelines.ingest import Side, ingest_shard, require_countable, require_rows, sides, written_as

_ROWS_AT_ONCE = 1000
SIDES: tuple[Literal["chosen", "rejected"], ...] = ("chosen", "rejected")


@dataclass(frozen=True)
class Piece:
    """Text of a dialogue as the chat template writes it."""

    text: str
    tokens: int
    loss: bool
    """Whether the loss is computed on these tokens."""


@dataclass(frozen=True)
class Example:
    """A pair."""

    messages: dict[str, Any]
    """Prompt, chosen, rejected, as canonical rows have them."""
    pieces: dict[str, list[Piece]] | None
    """chosen, rejected: the whole sequence; empty where the pair has no such side. None: no model is named."""


@dataclass
class Sheet:
    """Files of one format."""

    format: Format
    files: list[str]
    columns: tuple[str, ...]
    """Of all the files together."""
    read: tuple[str, ...]
    """Those of them that are read."""
    rows: int = 0
    """That were looked through."""
    is_all: bool = True
    """Whether these are all rows."""
    pairs: int = 0
    """That they make, and that are not dropped."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason → rows."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason → the first such row, where it is known."""
    noted: Counter[str] = field(default_factory=Counter)
    """As tally.NOTED has them."""
    examples: list[Example] = field(default_factory=list)


def sheets(config: Config, rows: int | None, examples: int, *, with_model: bool) -> list[Sheet]:
    """What the files of data.train and data.eval are, by format.

    Args:
        rows: of each format are looked through, the first ones; None: all.
        examples: pairs of each format that are shown.
        with_model: whether to apply the chat template of `model` and its limits in tokens.

    Raises DataError where there is no file or no row, and where a file is damaged or of no format.
    """
    named = sides(config)
    files = dict.fromkeys(file for side in named for file in side.files)
    found = map_files(lambda file: _looked_at(file, config), list(files))
    looked = {file: (seen, format_) for file, seen, format_ in found}
    for side in named:
        require_rows([looked[file][0] for file in side.files], side.key)
        for format_ in (looked[file][1] for file in side.files):
            if format_ is not None:
                require_countable(format_, side)
    by_name: dict[str, list[tuple[Location, Peek | FileRecord]]] = {}
    formats: dict[str, Format] = {}
    for file, seen, format_ in found:
        if format_ is not None and seen.has_rows:
            formats[format_.name] = format_
            by_name.setdefault(format_.name, []).append((file, seen))
    config.data.require_used(set(formats))
    tokenize = TokenizeShard(config.model, config.data) if with_model else None
    quota = _Quota(named)
    return [_sheet(formats[name], by_name[name], config, rows, examples, tokenize, quota) for name in sorted(by_name)]


class _Quota:
    """What is left of the rows that each source gives (max_rows), file after file; of a source with files of several
    formats, those of one format are taken first."""

    def __init__(self, named: Sequence[Side]):
        self._side_of = {file: side.key for side in named for file in side.files}
        self._left = {side.key: math.inf if side.max_rows is None else side.max_rows for side in named}

    def of(self, file: Location) -> float:
        return self._left[self._side_of[file]]

    def take(self, file: Location, rows: int) -> None:
        self._left[self._side_of[file]] -= rows


def _looked_at(file: Location, config: Config) -> tuple[Location, Peek, Format | None]:
    seen = peek(file)
    return file, seen, written_as(seen, str(file), config.data)


def _sheet(
    format_: Format,
    files: list[tuple[Location, Peek | FileRecord]],
    config: Config,
    rows: int | None,
    examples: int,
    tokenize: TokenizeShard | None,
    quota: _Quota,
) -> Sheet:
    ingest = ingest_shard(config)
    columns = tuple(dict.fromkeys(column for _, seen in files for column in seen.columns))
    wanted = ingest.columns(format_.name)
    read = tuple(column for column in columns if column in wanted)
    sheet = Sheet(format_, [file.uri for file, _ in files], columns, read)
    for file, _ in files:
        source = RawShard(RawPart(file.uri), format_.name, "train")
        numbered = ingest.rows(source)
        while some := list(itertools.islice(numbered, int(min(_left(sheet, rows), quota.of(file))))):
            quota.take(file, len(some))
            _count(sheet, ingest.of_rows(some, source), tokenize, examples)
            if rows is not None and sheet.rows >= rows:
                is_through = not quota.of(file) or next(numbered, None) is None
                sheet.is_all = is_through and file == files[-1][0]
                return sheet
    return sheet


def _left(sheet: Sheet, rows: int | None) -> int:
    return _ROWS_AT_ONCE if rows is None else min(_ROWS_AT_ONCE, rows - sheet.rows)


def _count(sheet: Sheet, output: ShardOutput, tokenize: TokenizeShard | None, examples: int) -> None:
    """Add what became of some rows."""
    sheet.rows += output.counters["read"]
    sheet.dropped.update({reason: output.counters[reason] for reason in REASONS if output.counters[reason]})
    for row in output.quarantine.to_pylist() if output.quarantine is not None else []:
        sheet.first.setdefault(row["reason"], f"row {row['row']} of {row['source']}")
    pairs = {row["pair_id"]: row for row in output.table.to_pylist()}
    if tokenize is None:
        sheet.pairs += output.table.num_rows
        made: Iterator[Example] = (Example(_messages(row), None) for row in pairs.values())
    else:
        with tempfile.TemporaryDirectory(prefix="dpo-ray-data-") as scratch:
            place = Location.of(Path(scratch) / "pairs.parquet")
            write_shard(place, output.table, {})
            tokenized = tokenize(PairsShard(place.uri))
        sheet.pairs += tokenized.table.num_rows
        sheet.noted.update({name: tokenized.counters[name] for name in NOTED if tokenized.counters[name]})
        others = {name for name in tokenized.counters if name not in NOTED and name != "read"}
        sheet.dropped.update({name: tokenized.counters[name] for name in others if tokenized.counters[name]})
        decode = tokenize.chat.tokenizer.decode
        kept = (row for row in tokenized.table.slice(0, examples).to_pylist())
        made = (Example(_messages(pairs[row["pair_id"]]), _pieces(row, decode)) for row in kept)
    sheet.examples += itertools.islice(made, examples - len(sheet.examples))


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {
        "prompt": plain(row["prompt"]),
        "tools": row["tools"],
    }
    said |= {side: plain(answer_of(row, side)) for side in SIDES}
    return {name: value for name, value in said.items() if value is not None}


def _pieces(row: dict[str, Any], decode: Any) -> dict[str, list[Piece]]:
    """The sequences of a tokenized row, cut where the loss begins and where it ends."""
    found: dict[str, list[Piece]] = {}
    for side in SIDES:
        prompt, ids = row["prompt_ids"], row[f"{side}_ids"]
        tokens = zip([False] * len(prompt) + (row[f"{side}_mask"] or [True] * len(ids)), [*prompt, *ids], strict=True)
        runs = [(loss, [token for _, token in run]) for loss, run in itertools.groupby(tokens, key=lambda one: one[0])]
        found[side] = [Piece(decode(run), len(run), loss) for loss, run in runs] if ids else []
    return found
