"""Rows that make no pair: how they are kept, and how many of them are too many.

Every ingested row is kept, or quarantined with one reason. In the counters of the artifact `kept` counts pairs, and
`more_pairs` those beyond the first of a ranked row. So:

    read = (kept - more_pairs) + the sum over the reasons
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from typing import Any

import pyarrow as pa

from dpo_ray.data.raw.json_lines import RAW_BOUND
from dpo_ray.data.rules import MEANING, REASONS, Reason
from dpo_ray.data.tally import Tally
from dpo_ray.errors import DataError
from dpo_ray.pairs import QUARANTINE
from dpo_ray.storage.artifact import Artifact, read_shard

_EXPLAINED = 3
_NO_FAULT: frozenset[Reason] = frozenset({"tie"})
"""Of rows in which nothing is wrong: who judged them saw no difference, as often happens where people are asked."""
_DEPTH = 32


def quarantined(source: str, number: int, reason: Reason, raw: Any) -> dict[str, Any]:
    """A row of QUARANTINE. What was read is kept as JSON, text that could not be parsed as it stands, both cut."""
    text = raw if isinstance(raw, str) else json.dumps(_cut(raw, _DEPTH), ensure_ascii=True, default=str)
    return {"source": source, "row": number, "reason": reason, "raw": text[:RAW_BOUND]}


def quarantine_table(rows: list[dict[str, Any]]) -> pa.Table | None:
    """Rows as a shard of the quarantine; None where there are none."""
    return pa.Table.from_pylist(rows, schema=QUARANTINE) if rows else None


def bad_rows(tally: Tally) -> Counter[Reason]:
    """Rows in quarantine by reason. Raises DataError where they and the rows kept are not the rows read."""
    bad = Counter({reason: tally.dropped[reason] for reason in REASONS if reason in tally.dropped})
    kept = tally.kept - tally.more_pairs
    if kept + bad.total() != tally.read:
        raise DataError(
            f"Of {tally.read} rows {kept} were kept and {bad.total()} quarantined: these do not add up. "
            "Remove the folder artifacts/pairs below run.output; ingest will then read the data again."
        )
    return bad


def require_enough_kept(pairs: Artifact, max_quarantined_fraction: float) -> None:
    """Raises DataError where too large a share of the rows is unusable, or where no pair is left. Ties are usable rows
    that say nothing, and count towards no share."""
    tally = Tally.of(pairs.manifest.counters)
    bad = bad_rows(tally)
    faulty = Counter({reason: count for reason, count in bad.items() if reason not in _NO_FAULT})
    if faulty.total() <= max_quarantined_fraction * tally.read and tally.kept:
        return
    ranked = (faulty if tally.kept else bad).most_common()
    examples = _examples(pairs, {reason for reason, _ in ranked[:_EXPLAINED]})
    said = [
        f"{reason} {count} ({MEANING[reason]}; the first: {examples[reason]})" for reason, count in ranked[:_EXPLAINED]
    ]
    said += [f"{reason} {count}" for reason, count in ranked[_EXPLAINED:]]
    where = f"These rows, with their reasons, are {pairs.where_quarantined()}"
    if not tally.kept:
        raise DataError(
            f"None of the {tally.read} rows read makes a preference pair: {', '.join(said)}. {where}. Look with "
            "`dpo-ray data` what the files are taken for, and name their columns (data.columns) or format "
            "(data.layout) if it is not what they are."
        )
    raise DataError(
        f"{faulty.total()} of {tally.read} rows ({faulty.total() / tally.read:.1%}) make no preference pair, more than "
        f"data.max_quarantined_fraction={max_quarantined_fraction:g} allows: {', '.join(said)}. {where}; mend the "
        "input, or raise the limit if they may be left out."
    )


def _examples(pairs: Artifact, reasons: Collection[Reason]) -> dict[str, str]:
    """Reason → file and number of the first such row."""
    found: dict[str, str] = {}
    for file in pairs.quarantines():
        if len(found) < len(reasons):
            for row in read_shard(file, ["source", "row", "reason"]).to_pylist():
                if row["reason"] in reasons:
                    found.setdefault(row["reason"], f"row {row['row']} of {row['source']}")
    return found


def _cut(value: Any, depth: int) -> Any:
    """A value whose JSON begins with the same RAW_BOUND characters, but for what is nested very deep."""
    if isinstance(value, str | bytes):
        return value[:RAW_BOUND]
    if isinstance(value, list | dict) and depth == 0:
        return "…"
    if isinstance(value, list):
        return [_cut(v, depth - 1) for v in value[:RAW_BOUND]]
    if isinstance(value, dict):
        return {k[:RAW_BOUND]: _cut(v, depth - 1) for k, v in list(value.items())[:RAW_BOUND]}
    return value
