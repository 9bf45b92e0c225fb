"""Texts chosen and rejected beside a question and a system message, as in Orca pairs and what distilabel writes."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import TIE, Format, Row, answered, asked, compared, is_text, no_pair, text

_QUESTIONS = ("input", "question", "instruction", "prompt")
_SYSTEMS = ("system", "system_prompt")


def _question(row: Row) -> str:
    there = [name for name in _QUESTIONS if name in row]
    return next((name for name in there if row[name] is not None), there[0] if there else "question")


def _is_unclear(row: Row) -> bool:
    """Whether two columns may be the question."""
    return sum(row.get(name) is not None for name in _QUESTIONS) > 1


def _system(row: Row) -> Any:
    return next((row[name] for name in _SYSTEMS if row.get(name) is not None), None)


def _fits(row: Row) -> bool:
    if "instruction" in row and ("input" in row or "history" in row):  # parts of one prompt, as alpaca has them
        return False
    if _is_unclear(row):
        return False
    system = _system(row)
    return is_text(row[_question(row)], row["chosen"], row["rejected"]) and (system is None or is_text(system))


def _fields(row: Row) -> dict[str, Any]:
    if _is_unclear(row):
        no_pair("two_questions")
    prompt = asked(text(row, _question(row)))
    chosen, rejected = (answered(text(row, side)) for side in ("chosen", "rejected"))
    return {
        "prompt": prompt,
        "system": _system(row),
        **compared(chosen, rejected, TIE if row.get("status") == "tie" else 1),
    }


FORMAT = Format(
    name="orca",
    about="system, chosen, rejected, and input, question, instruction or prompt: all text",
    layout="paired",
    columns=(
        ("input", "chosen", "rejected"),
        ("question", "chosen", "rejected"),
        ("instruction", "chosen", "rejected"),
        ("system_prompt", "prompt", "chosen", "rejected"),
    ),
    optional=(*_SYSTEMS, "status"),
    fits=_fits,
    fields=_fields,
)
