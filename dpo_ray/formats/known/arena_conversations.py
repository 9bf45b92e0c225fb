"""Two dialogues, and which of them won or whether it is a tie (Chatbot Arena, MT-Bench)."""

from __future__ import annotations

from typing import Any

from dpo_ray.formats.format import Format, Row, compared, is_turns, present
from dpo_ray.formats.verdict import first_is_better, is_verdict

_SIDES = ("conversation_a", "conversation_b")


def _fits(row: Row) -> bool:
    return all(is_turns(row[side]) for side in _SIDES) and is_verdict(row)


def _fields(row: Row) -> dict[str, Any]:
    first, second = (_spoken(_judged(present(row, side), row.get("turn"))) for side in _SIDES)
    return compared(first, second, first_is_better(row))


def _judged(dialogue: Any, turns: Any) -> Any:
    """A dialogue as far as it was judged: MT-Bench has both questions in it also where the first answer is."""
    if not isinstance(dialogue, list) or not isinstance(turns, int) or isinstance(turns, bool) or turns < 1:
        return dialogue
    asked = [place for place, turn in enumerate(dialogue) if isinstance(turn, dict) and turn.get("role") == "user"]
    return dialogue[: asked[turns]] if turns < len(asked) else dialogue


def _spoken(dialogue: Any) -> Any:
    """A dialogue whose contents are text, where they are lists of parts that are all text; images stay."""
    if not isinstance(dialogue, list):
        return dialogue
    return [_joined(turn) if isinstance(turn, dict) else turn for turn in dialogue]


def _joined(turn: dict[str, Any]) -> dict[str, Any]:
    parts = turn.get("content")
    if not isinstance(parts, list) or not parts or not all(map(_is_text_part, parts)):
        return turn
    return {**turn, "content": "\n".join(part["text"] for part in parts)}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


FORMAT = Format(
    name="arena_conversations",
    about="conversation_a, conversation_b, winner",
    layout="paired",
    columns=((*_SIDES, "winner"),),
    optional=("turn",),
    typed=("turn",),
    fits=_fits,
    fields=_fields,
)
