"""What it cost: time by stage, and what each stage did."""

from __future__ import annotations

from dpo_ray.report.charts import bars
from dpo_ray.report.document import Block, Paragraph, Section, Table
from dpo_ray.report.facts import Facts
from dpo_ray.report.shown import duration, listed

_MOST_BARS = 20


def cost_section(facts: Facts) -> Section | None:
    stages = facts.summary["stages"]
    if not stages:
        return None
    blocks: list[Block] = []
    cost = facts.summary.get("cost")
    reused = sum(entry["reused"] for entry in stages.values())
    if cost:
        gpus = f" and {cost['gpu_hours']:.2f} GPU hours" if cost["gpu_hours"] else ""
        blocks.append(
            Paragraph(
                f"{duration(3600 * cost['hours'])} from start to end, {cost['worker_hours']:.2f} worker hours{gpus}. "
                f"{reused} of {len(stages)} stages were finished already and cost nothing again."
            )
        )
    took = {name: entry["seconds"] for name, entry in stages.items() if entry["seconds"] > 0}
    shown = dict(sorted(took.items(), key=lambda item: -item[1])[:_MOST_BARS])
    if shown:
        more = f" The {_MOST_BARS} longest of {len(took)}." if len(took) > len(shown) else ""
        blocks.append(
            bars("Time by stage", f"Seconds that each stage took, the longest first.{more}", shown, "seconds")
        )
    rows = [
        [
            name,
            "taken over" if entry["reused"] else "made",
            f"{entry['seconds']:,}",
            *("" if entry["rows"][key] is None else f"{entry['rows'][key]:,}" for key in ("in", "kept")),
            listed(entry["rows"]["dropped"]),
            f"{entry['workers']}" if "workers" in entry else "",
            entry["fingerprint"],
        ]
        for name, entry in stages.items()
    ]
    head = ["stage", "", "seconds", "rows in", "kept", "dropped", "workers", "fingerprint"]
    blocks.append(Table(head, rows, caption="All stages", code=frozenset({7}), is_folded=True))
    return Section("cost", "Cost and time", blocks)
