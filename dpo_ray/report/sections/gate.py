"""The gate: what it asks for, what was measured, and whether it holds."""

from __future__ import annotations

from dpo_ray.evaluation.gate import conditions
from dpo_ray.report.document import Paragraph, Section, Table
from dpo_ray.report.facts import Facts
from dpo_ray.report.shown import interval, number


def gate_section(facts: Facts) -> Section | None:
    if not facts.evaluation:
        return None
    asked = conditions(facts.config.publish.gate, dict(facts.evaluation))
    if not asked:
        return Section("gate", "The gate", [Paragraph("publish.gate asks for nothing.", "warning")])
    rows = []
    for one in asked:
        found = one.found
        measured = [number(found["value"]), interval(found), f"{found['n']:,}"] if found else ["undefined", "", ""]
        holds = "holds" if one.failure is None else "does not hold"
        rows.append([one.name.replace("_", " "), holds, one.asked, *measured, f"publish.gate.{one.key}"])
    head = ["measure", "", "asked for", "value", "95% interval", "n", "option"]
    said = "Each condition must hold for the whole of its 95% interval."
    return Section("gate", "The gate", [Paragraph(said), Table(head, rows, code=frozenset({6}))])
