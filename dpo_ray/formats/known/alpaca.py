"""Texts chosen and rejected beside instruction and input, as LLaMA-Factory has them."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import Format, Row, answered, asked, is_text, no_pair, text


def _fits(row: Row) -> bool:
    more = row.get("input")
    return is_text(row["instruction"], row["chosen"], row["rejected"]) and (more is None or is_text(more))


def _fields(row: Row) -> dict[str, Any]:
    instruction = text(row, "instruction")
    more = text(row, "input") if row.get("input") is not None else ""
    question = "\n".join(part for part in (instruction, more) if part)
    prompt = [*_earlier(row.get("history")), *asked(question)]
    return {"prompt": prompt, "chosen": answered(text(row, "chosen")), "rejected": answered(text(row, "rejected"))}


def _earlier(history: Any) -> list[dict[str, Any]]:
    """Turns of before: a list of questions, each with its answer."""
    if not (history is None or isinstance(history, list)):
        no_pair("non_string_content")
    turns = []
    for turn in history or []:
        if not isinstance(turn, list) or len(turn) != 2:
            no_pair("role_order")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return turns


FORMAT = Format(
    name="alpaca",
    about="instruction, input or history, chosen, rejected: all text",
    layout="paired",
    columns=tuple(("instruction", more, "chosen", "rejected") for more in ("input", "history")),
    typed=("history",),
    fits=_fits,
    fields=_fields,
)
