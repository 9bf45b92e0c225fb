"""What a stage does with one shard: a source in, a table and its counters out. No Ray here.

A source is a plain dict that names files and places in them, so that it can travel to any worker.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.artifacts import read_shard
from dpo_ray.errors import DataError
from dpo_ray.formats import PAIRED_COLUMNS, UNPAIRED_COLUMNS, canonical_pair, canonical_prompt, is_unpaired
from dpo_ray.model_folders import PACKAGE, package_file
from dpo_ray.pairing import make_pairs
from dpo_ray.pairs import PAIRS, PROMPTS, QUARANTINE, prompt_id, split_of
from dpo_ray.quality import BadRow
from dpo_ray.rewards import load_reward
from dpo_ray.storage import Location

_RAW_BOUND = 2000  # characters of a quarantined row that are kept


@dataclass(frozen=True)
class ShardOutput:
    """What came of one shard."""

    table: pa.Table
    counters: Counter[str]
    """`read`, and rows dropped by reason."""
    quarantine: pa.Table | None = None


class IngestShard:
    """Raw rows → canonical pairs; bad rows → quarantine with the reason."""

    def __init__(self, held_out_fraction: float, seed: int):
        self.held_out_fraction = held_out_fraction
        self.seed = seed

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        kept, bad, counters = [], [], Counter[str]()
        for number, row in _raw_rows(source):
            counters["read"] += 1
            try:
                pair = canonical_pair(row)
            except BadRow as error:
                counters[error.reason] += 1
                raw = json.dumps(row, ensure_ascii=True, default=str)[:_RAW_BOUND]
                bad.append({"source": source["file"], "row": number, "reason": error.reason, "raw": raw})
                continue
            split = source["split"] or split_of(pair.prompt_id, self.held_out_fraction, self.seed)
            kept.append(
                {
                    "pair_id": pair.pair_id,
                    "prompt_id": pair.prompt_id,
                    "split": split,
                    "prompt": list(pair.prompt),
                    "chosen": pair.chosen,
                    "rejected": pair.rejected,
                }
            )
        quarantine = pa.Table.from_pylist(bad, schema=QUARANTINE) if bad else None
        return ShardOutput(pa.Table.from_pylist(kept, schema=PAIRS), counters, quarantine)


class PairShard:
    """Candidates → scored → pairs."""

    def __init__(self, reward: str, min_score_gap: float, pairs_per_prompt: int):
        self.reward = load_reward(reward)
        self.min_score_gap = min_score_gap
        self.pairs_per_prompt = pairs_per_prompt

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        kept, counters = [], Counter[str]()
        for row in read_shard(Location(source["file"])).to_pylist():
            counters["read"] += 1
            question = row["prompt"][-1]["content"]
            texts = [c["text"] for c in row["completions"]]
            scores = [self.reward(question, c["text"], c["finished"]) for c in row["completions"]]
            pairs, rejected = make_pairs(
                row["prompt"],
                texts,
                scores,
                min_score_gap=self.min_score_gap,
                pairs_per_prompt=self.pairs_per_prompt,
            )
            counters.update(rejected)
            counters["without_pair"] += not pairs
            kept += [
                {
                    "pair_id": pair.pair_id,
                    "prompt_id": row["prompt_id"],
                    "split": row["split"],
                    "prompt": row["prompt"],
                    "chosen": pair.chosen,
                    "rejected": pair.rejected,
                }
                for pair in pairs
            ]
        return ShardOutput(pa.Table.from_pylist(kept, schema=PAIRS), counters)


def read_prompts(uri: str, held_out_fraction: float, seed: int) -> dict[str, list[dict[str, Any]]]:
    """A file of prompts (JSON lines or Parquet, column `prompt`), by side of the split, without duplicates.

    Raises DataError naming the file and the first bad line.
    """
    location = Location.of(package_file(uri) if uri.startswith(PACKAGE) else uri)
    try:
        data = location.read_bytes()
    except (FileNotFoundError, OSError) as error:
        raise DataError(
            f"generate.prompts is {uri}, which cannot be read ({error}). Name a JSON lines or Parquet "
            "file with a `prompt` column."
        ) from error
    rows = _parquet_prompts(data, uri) if location.name.endswith(".parquet") else _json_prompts(data, uri)
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    seen = set()
    for number, row in rows:
        try:
            prompt = canonical_prompt(row.get("prompt"))
        except BadRow as error:
            raise DataError(
                f"{uri}, row {number}: not a prompt ({error.reason}). A row holds `prompt`: text, or "
                "messages that end with the user's turn."
            ) from error
        identifier = prompt_id(prompt)
        if identifier not in seen:
            seen.add(identifier)
            split = split_of(identifier, held_out_fraction, seed)
            sides[split].append({"prompt_id": identifier, "split": split, "prompt": prompt})
    if not seen:
        raise DataError(f"generate.prompts is {uri}, and there is no prompt in it.")
    return sides


def prompt_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of read_prompts as a shard."""
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def _json_prompts(data: bytes, uri: str) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{uri}, line {number} is not JSON ({error}).") from error
        yield number, row if isinstance(row, dict) else {}


def _parquet_prompts(data: bytes, uri: str) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        yield from enumerate(pq.read_table(io.BytesIO(data)).to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{uri} cannot be read as Parquet ({error}).") from error


def _raw_rows(source: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows [first, first + count) of a raw file, with their numbers. Raises DataError naming the file."""
    location, first, count = Location(source["file"]), source["first"], source["count"]
    fs, path = location.filesystem()
    try:
        with fs.open_input_file(path) as stream:
            parquet = pq.ParquetFile(stream)
            present = parquet.schema_arrow.names
            wanted = UNPAIRED_COLUMNS if is_unpaired(present) else PAIRED_COLUMNS
            columns = [c for c in wanted if c in present]
            start = 0
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                if start < first + count and start + size > first:
                    table = parquet.read_row_group(group, columns=columns)
                    low, high = max(0, first - start), min(size, first + count - start)
                    yield from enumerate(table.slice(low, high - low).to_pylist(), start=start + low)
                start += size
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{location} is damaged: rows {first} to {first + count - 1} cannot be read ({error}). Write "
            "the file again, or take it out of data.train and data.eval."
        ) from error
