"""Texts chosen and rejected beside a question and a system message, as in Orca pairs and what distilabel writes."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import Format, Row, answered, asked, is_text, text

_QUESTIONS = ("input", "question", "instruction", "prompt")


def _question(row: Row) -> str:
    return next((name for name in _QUESTIONS if name in row), "question")


def _fits(row: Row) -> bool:
    if "instruction" in row and "input" in row:  # two parts of one question, as alpaca has them
        return False
    system = row.get("system")
    return is_text(row[_question(row)], row["chosen"], row["rejected"]) and (system is None or is_text(system))


def _fields(row: Row) -> dict[str, Any]:
    prompt = asked(text(row, _question(row)), row.get("system"))
    return {"prompt": prompt, "chosen": answered(text(row, "chosen")), "rejected": answered(text(row, "rejected"))}


FORMAT = Format(
    name="orca",
    about="system, chosen, rejected, and input, question, instruction or prompt: all text",
    layout="paired",
    columns=(
        ("input", "chosen", "rejected"),
        ("question", "chosen", "rejected"),
        ("instruction", "chosen", "rejected"),
        ("system", "prompt", "chosen", "rejected"),
    ),
    optional=("system",),
    fits=_fits,
    fields=_fields,
)
