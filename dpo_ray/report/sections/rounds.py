"""Rounds: what each of them came to, and their own reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.report.charts import intervals
from dpo_ray.report.document import Block, Links, Paragraph, Section, Table
from dpo_ray.report.facts import Facts
from dpo_ray.report.shown import estimate


def rounds_section(facts: Facts) -> Section | None:
    rounds: Sequence[Mapping[str, Any]] = facts.summary.get("rounds") or []
    if not rounds:
        return None
    best = next(one["round"] for one in rounds if one["best"])
    said = (
        f"{len(rounds)} round{'s' * (len(rounds) > 1)}, each measured on the same held-out prompts; round {best} is "
        "the best, and the rest of this page is about it. A round improves where its whole interval lies above the "
        "value of the best one before it."
    )
    blocks: list[Block] = [
        Paragraph(said),
        _by_round(rounds, "win_rate", f"Win rate against {facts.opponent}, by round", "win rate", 0.5, (0.0, 1.0)),
    ]
    if any(one.get("accuracy") for one in rounds):
        title, domain = "Held-out accuracy by round", (0.0, 1.0)
        blocks.append(_by_round(rounds, "accuracy", title, "accuracy", 0.5, domain))
    if any(one.get("kl_per_token") for one in rounds):
        title = "KL from the first model by round"
        blocks.append(_by_round(rounds, "kl_per_token", title, "nats a token", None, None))
    rows = [
        [
            f"{one['round']}{', the best' if one['best'] else ''}",
            f"{one['pairs']:,}",
            *(estimate(one[name]) if one.get(name) else "–" for name in ("win_rate", "accuracy", "kl_per_token")),
            one["policy"],
        ]
        for one in rounds
    ]
    blocks.append(
        Table(["round", "pairs", "win rate", "accuracy", "KL, nats a token", "policy"], rows, code=frozenset({5}))
    )
    links = [(f"Report of round {one['round']}", one["report"]) for one in rounds if one.get("report")]
    return Section("rounds", "Rounds", [*blocks, *([Links(links)] if links else [])])


def _by_round(
    rounds: Sequence[Mapping[str, Any]],
    name: str,
    title: str,
    unit: str,
    at: float | None,
    domain: tuple[float, float] | None,
) -> Block:
    found = [(f"round {one['round']}{' ★' if one['best'] else ''}", one[name]) for one in rounds if one.get(name)]
    return intervals(title, "★ marks the best round.", found, unit, at=at, domain=domain)
