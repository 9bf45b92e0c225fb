"""The data: lengths, sources, what was left out and why, and whether length tells the better answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_ray.report.charts import bars, histogram, intervals
from dpo_ray.report.document import Block, Paragraph, Section, Table
from dpo_ray.report.facts import Facts
from dpo_ray.report.shown import interval, listed

_EVEN = 0.5


def data_section(facts: Facts) -> Section | None:
    found = facts.summary.get("data")
    if not found:
        return None
    blocks: list[Block] = [Paragraph(_size(found))]
    if shares := _shares(found):
        blocks += [*_length_bias(found), _preferences(shares)]
    blocks += _lengths(found)
    if unused := _unused(found):
        title, says = "Rows that are not trained on", "By the reason for which they were left out."
        blocks.append(bars(title, says, unused, "rows"))
    counts = [
        [name.replace("_", " "), listed(found[name])]
        for name in ("formats", "sources", "judged", "noted", "scripts")
        if found.get(name)
    ]
    if counts:
        blocks.append(Table(["counted", "rows"], counts))
    return Section("data", "Data", blocks)


def _size(found: Mapping[str, Any]) -> str:
    splits = " and ".join(f"{count:,} to {_FOR.get(name, name)}" for name, count in sorted(found["splits"].items()))
    parts = [f"{found['pairs']:,} pairs{f', {splits}' if splits else ''}."]
    if "read" in found:
        parts.append(f"{found['read']:,} rows were read.")
    if "prompt_token_share" in found:
        parts.append(f"{found['prompt_token_share']:.1%} of the tokens are prompts'.")
    return " ".join(parts)


_FOR = {"train": "train on", "eval": "measure with"}


def _shares(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    shares = [("chosen is longer", found.get("chosen_longer"))]
    shares += [
        (f"reference, {_BY.get(by, by)}", share) for by, share in (found.get("reference_prefers_chosen") or {}).items()
    ]
    return [(label, share) for label, share in shares if share]


_BY = {"sum": "summed", "mean": "per token"}


def _preferences(shares: list[tuple[str, Mapping[str, Any]]]) -> Block:
    ties = {label: share["tie"] for label, share in shares if share.get("tie")}
    said = f" Ties, which are in none of them: {listed(ties)}." if ties else ""
    return intervals(
        "What tells chosen from rejected already",
        "The share of pairs in which the chosen answer is the longer one, and in which the reference gives it the "
        f"higher log-probability, summed or per token; the line is at even.{said}",
        shares,
        "share of pairs",
        at=_EVEN,
        domain=(0.0, 1.0),
    )


def _length_bias(found: Mapping[str, Any]) -> list[Block]:
    share = found.get("chosen_longer")
    if not share:
        return []
    if share["low"] > _EVEN:
        text = "Length bias: the longer answer is the chosen one more often than not"
        advice = "a policy can win by writing more. Look at the win rate at equal lengths."
    elif share["high"] < _EVEN:
        text = "Length bias: the shorter answer is the chosen one more often than not"
        advice = "a policy can win by writing less. Look at the win rate at equal lengths."
    else:
        return [Paragraph(f"Length does not tell which answer is chosen: the longer one is in {_said(share)}.")]
    return [Paragraph(f"{text} (the longer one in {_said(share)}): {advice}", "warning")]


def _said(share: Mapping[str, Any]) -> str:
    return f"{share['value']:.1%} of pairs, 95% interval {interval(share)}"


def _lengths(found: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    shown = found.get("token_histograms")
    if shown:
        answers = {name: shown["counts"][name] for name in ("chosen", "rejected") if name in shown["counts"]}
        if answers:
            says = "Tokens of the answers: where the two lie apart, length alone tells them apart."
            blocks.append(histogram("Length of answers", says, {**shown, "counts": answers}, "tokens"))
        if "prompt" in shown["counts"]:
            prompts = {**shown, "counts": {"prompt": shown["counts"]["prompt"]}}
            blocks.append(histogram("Length of prompts", "Tokens of the prompts.", prompts, "tokens"))
    if found.get("tokens"):
        keys = ("p5", "p50", "p95", "p99", "max", "n")
        rows = [[name, *(f"{of_part[key]:,}" for key in keys)] for name, of_part in found["tokens"].items()]
        blocks.append(Table(["tokens", *keys], rows))
    return blocks


def _unused(found: Mapping[str, Any]) -> dict[str, float]:
    parts = {"quarantined": "", "left_out": "", "dropped": ""}
    return {
        reason.replace("_", " "): count for part in parts for reason, count in (found.get(part) or {}).items() if count
    }
