"""The report of a run: what each section has to say, in the order of the page."""

from __future__ import annotations

from dpo_ray.report.document import Document
from dpo_ray.report.facts import Facts
from dpo_ray.report.first import changes, facts_of, figures, verdict
from dpo_ray.report.sections.cost import cost_section
from dpo_ray.report.sections.data import data_section
from dpo_ray.report.sections.evaluation import drift_section, held_out_section, tasks_section, win_rate_section
from dpo_ray.report.sections.gate import gate_section
from dpo_ray.report.sections.lineage import lineage_section
from dpo_ray.report.sections.reference import reference_section
from dpo_ray.report.sections.reproduce import reproduce_section
from dpo_ray.report.sections.rounds import rounds_section
from dpo_ray.report.sections.samples import samples_section
from dpo_ray.report.sections.training import training_section

_SECTIONS = (
    rounds_section,
    gate_section,
    win_rate_section,
    samples_section,
    held_out_section,
    drift_section,
    tasks_section,
    training_section,
    data_section,
    reference_section,
    lineage_section,
    cost_section,
    reproduce_section,
)


def run_document(facts: Facts) -> Document:
    """The report; what was not measured is not in it."""
    said, tone, why = verdict(facts)
    sections = [section for make in _SECTIONS if (section := make(facts)) is not None]
    return Document(
        title=facts.summary["run_id"],
        verdict=said,
        tone=tone,
        why=why,
        figures=figures(facts),
        facts=facts_of(facts),
        changes=changes(facts),
        sections=[*facts.more, *sections],
    )
