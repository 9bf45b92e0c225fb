"""Two dialogues, and which of them won or whether it is a tie (Chatbot Arena, MT-Bench)."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import Format, Row, compared, is_turns, present
from dpo_ray.formats.verdict import first_is_better, is_verdict

_SIDES = ("conversation_a", "conversation_b")


def _fits(row: Row) -> bool:
    return all(is_turns(row[side]) for side in _SIDES) and is_verdict(row)


def _fields(row: Row) -> dict[str, Any]:
    first, second = (present(row, side) for side in _SIDES)
    return compared(first, second, first_is_better(row))


FORMAT = Format(
    name="arena_conversations",
    about="conversation_a, conversation_b, winner",
    layout="paired",
    columns=((*_SIDES, "winner"),),
    fits=_fits,
    fields=_fields,
)
