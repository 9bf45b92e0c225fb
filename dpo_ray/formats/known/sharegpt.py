"""A dialogue with two messages that could follow it, as LLaMA-Factory and axolotl have them."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import Format, Row, present
from dpo_ray.formats.sharegpt_turns import are_either, is_either, message, messages


def _dialogue(row: Row) -> str:
    return "conversations" if "conversations" in row else "messages"


def _fits(row: Row) -> bool:
    return are_either(row[_dialogue(row)]) and is_either(row["chosen"]) and is_either(row["rejected"])


def _fields(row: Row) -> dict[str, Any]:
    prompt = messages(present(row, _dialogue(row)))
    return {"prompt": prompt, **{side: [message(present(row, side))] for side in ("chosen", "rejected")}}


FORMAT = Format(
    name="sharegpt",
    about="conversations (or messages), and the messages chosen and rejected that could follow, as from and value",
    layout="paired",
    columns=(("conversations", "chosen", "rejected"), ("messages", "chosen", "rejected")),
    fits=_fits,
    fields=_fields,
)
