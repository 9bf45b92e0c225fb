"""What a run's report holds of the texts of others."""

from __future__ import annotations

from pydantic import Field

from dpo_ray.config.section import Section

MOST_SAMPLES = 200


class Report(Section):
    samples: int = Field(60, ge=0, le=MOST_SAMPLES)
    """Held-out prompts, the first ones by prompt id, whose answers before and after stand in report.html and
    report.md; the first of them in summary.json and in the closing lines, too. 0: none anywhere, so that no prompt and
    no answer is in what is handed on. They are there where evaluate.win_rate has answers sampled."""
