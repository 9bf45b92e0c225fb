"""What a stage does with one shard: a source in, a table and its counters out. No Ray here.

A source is a plain dict that names files and places in them, so that it can travel to any worker.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.config import Columns, Pairing
from dpo_ray.config.layouts import Layout, fields_of
from dpo_ray.data.canonical import canonical_pairs, canonical_prompt
from dpo_ray.data.duplicates import find, left_out_table, read_bucket, read_kept
from dpo_ray.data.pairing import make_pairs
from dpo_ray.data.quarantine import quarantine_table, quarantined
from dpo_ray.data.raw.files import read_rows
from dpo_ray.data.raw.json_lines import Unreadable
from dpo_ray.data.report import measure_pairs, measure_reference, measure_tokens, to_table
from dpo_ray.data.rules import BadRow, check_length, reject
from dpo_ray.errors import DataError
from dpo_ray.pairs import PAIRS, PROMPTS, PreferencePair, prompt_id, split_of
from dpo_ray.reward_source import require_same_source
from dpo_ray.rewards import load_reward, score_completions
from dpo_ray.storage.artifact import open_artifact, read_shard
from dpo_ray.storage.location import Location
from dpo_ray.storage.packaged import PACKAGE, package_file


@dataclass(frozen=True)
class ShardOutput:
    """What came of one shard."""

    table: pa.Table
    counters: Counter[str]
    """`read`, and rows dropped by reason."""
    quarantine: pa.Table | None = None


class IngestShard:
    """Raw rows → canonical pairs, in order; bad rows → quarantine with the reason.

    A source names its `layout` (dpo_ray.config.layouts). A row with more than `max_characters` is bad.
    """

    def __init__(
        self,
        held_out_fraction: float,
        seed: int,
        columns: Columns = Columns(),
        pairing: Pairing = Pairing(),
        max_characters: int | None = None,
    ):
        self.held_out_fraction = held_out_fraction
        self.seed = seed
        self.columns = columns.in_files()
        self.pairing = pairing
        self.max_characters = max_characters

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        fields = {f: self.columns[f] for f in fields_of(source["layout"]) if f in self.columns}
        kept, bad, counters = [], [], Counter[str]()
        for number, row in read_rows(source, set(fields.values())):
            counters["read"] += 1
            try:
                pairs = self._pairs(row, source["layout"], fields)
            except BadRow as error:
                counters[error.reason] += 1
                raw = row.raw if isinstance(row, Unreadable) else row
                bad.append(quarantined(source["file"], number, error.reason, raw))
                continue
            if len(pairs) > 1:
                counters["more_pairs"] += len(pairs) - 1
            for pair in pairs:
                split = source["split"] or split_of(pair.prompt_id, self.held_out_fraction, self.seed)
                kept.append(
                    {
                        "pair_id": pair.pair_id,
                        "prompt_id": pair.prompt_id,
                        "couple_id": pair.couple_id,
                        "split": split,
                        "prompt": list(pair.prompt),
                        "chosen": pair.chosen,
                        "rejected": pair.rejected,
                        "tools": pair.tools,
                    }
                )
        return ShardOutput(pa.Table.from_pylist(kept, schema=PAIRS), counters, quarantine_table(bad))

    def _pairs(self, row: dict[str, Any] | Unreadable, layout: Layout, fields: dict[str, str]) -> list[PreferencePair]:
        if isinstance(row, Unreadable):
            reject(row.reason)
        named = {field: row[column] for field, column in fields.items() if column in row}
        if self.max_characters is not None:
            check_length(named, self.max_characters)
        return canonical_pairs(named, layout, self.pairing)


class PairShard:
    """Candidates → scored → pairs.

    Args:
        reward_source: what the driver knows the reward by (dpo_ray.reward_source).

    Raises ConfigError where the reward cannot be imported or has another source here.
    """

    def __init__(self, reward: str, reward_source: str, min_score_gap: float, pairs_per_prompt: int):
        self.reward_name, self.reward = reward, load_reward(reward)
        require_same_source(reward, reward_source)
        self.min_score_gap = min_score_gap
        self.pairs_per_prompt = pairs_per_prompt

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        kept, counters = [], Counter[str]()
        for row in read_shard(Location(source["file"])).to_pylist():
            counters["read"] += 1
            texts = [c["text"] for c in row["completions"]]
            scores = score_completions(self.reward_name, self.reward, row)
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
                    "couple_id": pair.couple_id,
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


class DuplicatesShard:
    """A bucket of a pairs artifact's rows → those of them that are left out."""

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        pairs = open_artifact(Location(source["artifact"]))
        shards = pairs.shards()
        rows = read_bucket(shards, source["bucket"], source["buckets"])
        table = left_out_table(rows, find(rows), [shard.name for shard in shards])
        counters = Counter[str](table["reason"].to_pylist())
        counters["read"] = len(rows.row)
        counters["kept"] = len(rows.row) - table.num_rows
        return ShardOutput(table, counters)


class MeasureShard:
    """A pairs, tokenized or reference shard → its part of the data report, as source["what"] says."""

    def __call__(self, source: dict[str, Any]) -> ShardOutput:
        measure = {"pairs": measure_pairs, "tokens": measure_tokens, "reference": measure_reference}[source["what"]]
        table, counters = read_kept(source)
        return ShardOutput(to_table(measure(table)), counters)


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
