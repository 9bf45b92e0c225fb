"""Answers before and after, to look through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_ray.report.document import Block, Paragraph, Sample, Samples, Section
from dpo_ray.report.facts import Facts
from dpo_ray.report.shown import number


def samples_section(facts: Facts) -> Section | None:
    """None where no answers were sampled; where report.samples keeps them out, it says so."""
    win_rate = facts.config.evaluate.win_rate
    title = "Answers before and after" if facts.other == "before" else f"Answers beside those of {facts.other}"
    if win_rate is None or not facts.evaluation.get("win_rate"):
        return None
    if facts.config.report.samples == 0:
        return Section("samples", title, [Paragraph("Left out: report.samples is 0.")])
    if not facts.samples:
        return None
    greedy = "greedy" if win_rate.sampling.include_greedy or win_rate.sampling.temperature == 0 else "the first drawn"
    said = (
        f"The answers to the first {len(facts.samples):,} held-out prompts, whatever came of them; {greedy}. […] marks "
        "what was cut while it was drawn. Won and lost are the tuned model's, by the judge of the win rate, on just "
        "these two answers."
    )
    blocks: list[Block] = [Paragraph(said), Samples([_sample(one) for one in facts.samples], facts.other)]
    return Section("samples", title, blocks)


def _sample(one: Mapping[str, Any]) -> Sample:
    parts = []
    if one.get("source"):
        parts.append(str(one["source"]))
    if one.get("tokens"):
        before, after = one["tokens"]
        parts.append(f"{before} → {after} tokens")
    if one.get("rewards"):
        before, after = one["rewards"]
        parts.append(f"reward {'' if before is None else f'{number(before)} → '}{number(after)}")
    prompt = f"{one['earlier']}\nuser: {one['prompt']}" if one.get("earlier") else one["prompt"]
    return Sample(prompt, one["before"], one["after"], one.get("outcome"), ", ".join(parts))
