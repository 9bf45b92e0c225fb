"""What the preference data are like: lengths, which answer is the longer one, scripts, what the reference prefers.

Each shard is measured by itself into a small table of counts. Counts add up, so that new shards cost only
themselves, and quantiles over all rows are exact in memory that depends on how many different lengths there are.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.data import duplicates, rules
from dpo_ray.data.tally import Tally
from dpo_ray.estimates import proportion
from dpo_ray.histogram import histograms
from dpo_ray.pairs import JUDGED, TIE, answer_of

MEASURES = pa.schema([("measure", pa.string()), ("value", pa.int64()), ("count", pa.int64())])
"""How many rows of a shard have a value of a measure. Measures that have no value but their name have 0."""

Measures = Counter[tuple[str, int]]
"""(measure, value) → rows."""

_PERCENTS = (5, 50, 95, 99)
_PARTS = ("prompt", "chosen", "rejected")
_SAID = {*_PARTS, "chosen_turns", "rejected_turns"}

# How the Unicode names of a script's letters begin → what the script is called.
_SCRIPTS = {
    "LATIN": "Latin",
    "FULLWIDTH LATIN": "Latin",
    "CYRILLIC": "Cyrillic",
    "GREEK": "Greek",
    "ARABIC": "Arabic",
    "HEBREW": "Hebrew",
    "DEVANAGARI": "Devanagari",
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "HALFWIDTH KATAKANA": "Japanese",
    "HANGUL": "Hangul",
    "THAI": "Thai",
}
_JAPANESE_FROM = 0.1  # share of kana among kana and Han letters; Japanese prose has far more, Chinese prose none


def measure_pairs(table: pa.Table) -> Measures:
    """Scripts of the rows of a pairs shard, of prompt and chosen answer together; or of the only answer there is."""
    measures: Measures = Counter()
    for row in table.select([name for name in table.column_names if name in _SAID]).to_pylist():
        answer = answer_of(row, "chosen")
        answer = answer_of(row, "rejected") if answer is None else answer
        said = [answer] if isinstance(answer, str) else [m["content"] for m in answer or ()]
        measures[f"script/{script_of([m['content'] for m in row['prompt']] + said)}", 0] += 1
    return measures


def measure_tokens(table: pa.Table) -> Measures:
    """Sides of the split, sources, judgements and token counts of the rows of a tokenized shard, and which answer is
    the longer one.

    A side that an unpaired row lacks has no count, and of such a row neither answer is the longer one; nor is it asked
    of a tie, in which no answer is the better one.
    """
    lengths = {part: pc.list_value_length(table[f"{part}_ids"]).to_numpy() for part in _PARTS}
    measures: Measures = Counter((f"split/{side}", 0) for side in table["split"].to_pylist())
    for part, of_part in lengths.items():
        values, counts = np.unique(of_part[of_part > 0], return_counts=True)
        measures.update({(f"tokens/{part}", int(v)): int(c) for v, c in zip(values, counts, strict=True)})
    both = (lengths["chosen"] > 0) & (lengths["rejected"] > 0)
    if "source" in table.column_names:
        pairs = zip(table["source"].to_pylist(), table["split"].to_pylist(), strict=True)
        measures.update((f"source/{source}/{side}", 0) for source, side in pairs if source is not None)
    for name in JUDGED:
        if name in table.column_names and (said := table.num_rows - table[name].null_count):
            measures[f"judged/{name}", 0] += said
    if "preference" in table.column_names:
        both &= table["preference"].fill_null(1.0).to_numpy() != TIE
    return measures + _compared("longer", lengths["chosen"][both], lengths["rejected"][both])


def measure_reference(table: pa.Table) -> Measures:
    """Which answer of the rows of a reference shard has the larger log-prob, summed and per token with the loss."""
    sides = ("chosen", "rejected")
    lengths = {side: pc.list_value_length(table[f"{side}_ref_logprobs"]).to_numpy() for side in sides}
    both = (lengths["chosen"] > 0) & (lengths["rejected"] > 0)
    sums = {side: _row_sums(table[f"{side}_ref_logprobs"])[both] for side in sides}
    means = {side: sums[side] / lengths[side][both] for side in sides}
    return _compared("prefers_by_sum", *sums.values()) + _compared("prefers_by_mean", *means.values())


def to_table(measures: Measures) -> pa.Table:
    """Counts as MEASURES, in a fixed order."""
    rows = [dict(zip(MEASURES.names, (*key, count), strict=True)) for key, count in sorted(measures.items())]
    return pa.Table.from_pylist(rows, schema=MEASURES)


def merge(tables: Iterable[pa.Table]) -> Measures:
    """The counts of several shards together."""
    measures: Measures = Counter()
    for table in tables:
        for measure, value, count in zip(*(table[name].to_pylist() for name in MEASURES.names), strict=True):
            measures[measure, value] += count
    return measures


def report(
    measures: Measures,
    *,
    ingested: Tally | None,
    left_out: Tally | None,
    tokenized: Tally,
    formats: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The report: what was not measured is absent.

    Args:
        ingested, left_out, tokenized: what these stages counted; without the first two the pairs were generated.
        formats: how many files are written in which format.

    `pairs` is how many rows were tokenized and `splits` on which side; `sources`, of a mixture, how many of each source
    on which side, and `judged` how many have a weight, a margin or a preference of their own; `scripts` counts the rows
    before the length limits. `tokens` holds quantiles by nearest rank, `token_histograms` counts by length; in
    `prompt_token_share` a prompt counts once a pair. Of `chosen_longer` and `reference_prefers_chosen`, `value` is a
    share of the n pairs that are no ties, with its 95% interval.
    """
    found: dict[str, Any] = {"pairs": tokenized.kept, **({"formats": dict(formats)} if formats else {})}
    if ingested is not None:
        found |= {"more_pairs": ingested.more_pairs} if ingested.more_pairs else {}
        found |= {"read": ingested.read, "quarantined": ingested.dropped_for(rules.REASONS)}
    if left_out is not None:
        found["left_out"] = left_out.dropped_for(duplicates.REASONS)
    found["dropped"] = tokenized.dropped_for(sorted(tokenized.dropped.keys() - set(duplicates.REASONS)))
    found["noted"] = tokenized.noted
    found["splits"] = _group(measures, "split")
    apart = {"sources": _group(measures, "source"), "judged": _group(measures, "judged")}
    found |= {name: counts for name, counts in apart.items() if counts}
    lengths = {part: dict(sorted(_values(measures, f"tokens/{part}").items())) for part in _PARTS}
    found["tokens"] = {part: quantiles(of_part) for part, of_part in lengths.items() if of_part}
    if of_all := {part: of_part for part, of_part in lengths.items() if of_part}:
        found["token_histograms"] = histograms(
            {part: np.array(list(of_part)) for part, of_part in of_all.items()},
            {part: np.array(list(of_part.values())) for part, of_part in of_all.items()},
            whole=True,
        )
    totals = {part: sum(length * count for length, count in of_part.items()) for part, of_part in lengths.items()}
    if any(totals.values()):
        found["prompt_token_share"] = totals["prompt"] / sum(totals.values())
    if chosen_longer := _share(_group(measures, "longer")):
        found["chosen_longer"] = chosen_longer
    found["scripts"] = dict(sorted(_group(measures, "script").items(), key=lambda item: (-item[1], item[0])))
    preferred = {by: _share(_group(measures, f"prefers_by_{by}")) for by in ("sum", "mean")}
    if any(preferred.values()):
        found["reference_prefers_chosen"] = {by: share for by, share in preferred.items() if share}
    return found


def report_lines(found: dict[str, Any]) -> list[str]:
    """The report for the log."""
    lines = [f"{found['pairs']} pairs{_listed(found['splits'], ': {}')}"]
    if found.get("formats"):
        lines.append(f"files by format{_listed(found['formats'], ': {}')}")
    for name in ("sources", "judged", "quarantined", "left_out", "dropped", "noted"):
        if found.get(name):
            lines.append(f"{name.replace('_', ' ')}{_listed(found[name], ': {}')}")
    for part, of_part in found["tokens"].items():
        lines.append(f"tokens of {part}{_listed(of_part, ': {}')}")
    if "prompt_token_share" in found:
        lines.append(f"{found['prompt_token_share']:.1%} of the tokens are prompts'")
    if "chosen_longer" in found:
        lines.append(f"the chosen answer is the longer one in {_said(found['chosen_longer'])}")
    if found["scripts"]:
        lines.append(f"scripts{_listed(found['scripts'], ': {}')}")
    return lines + preference_lines(found)


def preference_lines(found: dict[str, Any]) -> list[str]:
    """What the reference prefers, for the log; none where it was not measured."""
    shares = found.get("reference_prefers_chosen", {})
    return [f"the reference prefers chosen, by the {by} of log-probs, in {_said(s)}" for by, s in shares.items()]


def quantiles(counts: dict[int, int]) -> dict[str, int]:
    """Quantiles by nearest rank, the largest value and n. counts: value → rows, ascending, not empty."""
    values, total = list(counts), sum(counts.values())
    until = np.cumsum(list(counts.values()))
    # In whole numbers: the p-th percentile is the ⌈p n / 100⌉-th smallest.
    ranked = {f"p{p}": values[int(np.searchsorted(until, -(-p * total // 100)))] for p in _PERCENTS}
    return {**ranked, "max": values[-1], "n": total}


def script_of(texts: Iterable[str]) -> str:
    """The script that most letters of the texts are of; "other" for one without a name here.

    Kanji go with kana where there are any to speak of. Texts of digits and signs alone have "no letters".
    """
    letters: Counter[str] = Counter()
    for character, count in Counter("".join(texts)).items():
        if script := _script(character):
            letters[script] += count
    kana, han = letters["Japanese"], letters["Han"]
    if kana and kana >= _JAPANESE_FROM * (kana + han):
        letters += Counter(Japanese=han, Han=-han)
    return max(sorted(letters), key=lambda script: letters[script], default="no letters")


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str | None:
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "")
    return next((script for prefix, script in _SCRIPTS.items() if name.startswith(prefix)), "other")


def _compared(measure: str, chosen: np.ndarray, rejected: np.ndarray) -> Measures:
    finite = np.isfinite(chosen) & np.isfinite(rejected)
    outcomes = {
        "chosen": finite & (chosen > rejected),
        "rejected": finite & (chosen < rejected),
        "tie": finite & (chosen == rejected),
        "not_finite": ~finite,
    }
    return Counter({(f"{measure}/{name}", 0): int(np.sum(rows)) for name, rows in outcomes.items() if rows.any()})


def _row_sums(column: pa.ChunkedArray) -> np.ndarray:
    """[n] float64 sums of the lists of a column."""
    lists = column.combine_chunks()
    rows = pc.list_parent_indices(lists).to_numpy()
    return np.bincount(rows, weights=pc.list_flatten(lists).to_numpy(), minlength=len(lists))


def _values(measures: Measures, name: str) -> dict[int, int]:
    return {value: count for (measure, value), count in measures.items() if measure == name}


def _group(measures: Measures, group: str) -> dict[str, int]:
    found = {measure: count for (measure, _), count in sorted(measures.items())}
    return {name.removeprefix(f"{group}/"): count for name, count in found.items() if name.startswith(f"{group}/")}


def _share(outcomes: dict[str, int]) -> dict[str, Any] | None:
    """Of the comparisons that are no ties, how many fell to chosen; None where there is none."""
    chosen, n = outcomes.get("chosen", 0), outcomes.get("chosen", 0) + outcomes.get("rejected", 0)
    if not n:
        return None
    apart = {name: outcomes[name] for name in ("tie", "not_finite") if outcomes.get(name)}
    return {**proportion(chosen, n).as_dict(), **apart}


def _listed(counts: Mapping[str, Any], into: str) -> str:
    return into.format(", ".join(f"{name} {count}" for name, count in counts.items())) if counts else ""


def _said(share: dict[str, Any]) -> str:
    apart = "".join(f", {name.replace('_', ' ')} {share[name]}" for name in ("tie", "not_finite") if name in share)
    return f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}] (n={share['n']}{apart})"
