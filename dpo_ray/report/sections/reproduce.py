"""What it takes to have it again: the command, the versions, the configuration."""

from __future__ import annotations

from dpo_ray.config import dump_config
from dpo_ray.report.document import Block, Code, Paragraph, Section, Table
from dpo_ray.report.facts import Facts


def reproduce_section(facts: Facts) -> Section:
    blocks: list[Block] = []
    if command := facts.summary.get("command"):
        said = (
            "The resolved configuration lies in the run's folder; with it, the same data and the same versions, every "
            "finished stage is taken over, and what is missing is made again."
        )
        blocks += [Paragraph(said), Code(command)]
    if versions := facts.summary.get("versions"):
        blocks.append(Table(["package", "version"], [[name, of] for name, of in versions.items()], code=frozenset({1})))
    blocks.append(Code(dump_config(facts.given), "Configuration", is_folded=True))
    return Section("reproduce", "To reproduce it", blocks)
