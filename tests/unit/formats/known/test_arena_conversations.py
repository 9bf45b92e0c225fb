"""Chatbot Arena's and MT-Bench's conversations: two dialogues, a winner or a tie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.unit.formats.card import MESSAGES, TEXT, Card, check, said

_TYPES = {
    "question_id": TEXT,
    "model_a": TEXT,
    "model_b": TEXT,
    "winner": TEXT,
    "judge": TEXT,
    "conversation_a": MESSAGES,
    "conversation_b": MESSAGES,
    "turn": pa.int64(),
    "anony": pa.bool_(),
    "language": TEXT,
    "tstamp": pa.float64(),
    "openai_moderation": pa.struct([("flagged", pa.bool_()), ("category_scores", pa.struct([("hate", pa.float64())]))]),
}
_ROW = {
    **dict.fromkeys(_TYPES),
    "conversation_a": said("Why?", "So."),
    "conversation_b": said("Why?", "No."),
    "openai_moderation": {"flagged": False, "category_scores": {"hate": 0.1}},
}
_PART = pa.struct([("type", TEXT), ("text", TEXT), ("image", TEXT), ("mimeType", TEXT)])
_IN_PARTS = pa.list_(pa.struct([("role", TEXT), ("content", pa.list_(_PART))]))


def _in_parts(*turns: str, image: str | None = None) -> list[dict[str, Any]]:
    """A dialogue whose contents are lists, of a text each, or also of an image."""
    shown = [] if image is None else [{"type": "image", "text": None, "image": image, "mimeType": "image/png"}]
    text = {"type": "text", "image": None, "mimeType": None}
    return [{**turn, "content": [{**text, "text": turn["content"]}, *shown]} for turn in said(*turns)]


CARDS = [
    Card(
        source="lmsys/chatbot_arena_conversations",
        types=_TYPES,
        rows=[{**_ROW, "winner": winner} for winner in ("model_a", "model_b", "tie", "tie (bothbad)", None)],
        pairs=[(said("Why?"), "So.", "No."), (said("Why?"), "No.", "So.")],
        dropped={"tie": 2, "null_field": 1},
    ),
    Card(
        source="lmarena-ai/arena-human-preference-140k",
        types={"winner": TEXT, "conversation_a": _IN_PARTS, "conversation_b": _IN_PARTS, "language": TEXT},
        rows=[
            {
                "winner": "model_b",
                "conversation_a": _in_parts("Why?", "So."),
                "conversation_b": _in_parts("Why?", "No."),
                "language": "en",
            },
            {
                "winner": "model_b",
                "conversation_a": _in_parts("Why?", "So.", image="…"),
                "conversation_b": _in_parts("Why?", "No.", image="…"),
                "language": "en",
            },
            {
                "winner": "both_bad",
                "conversation_a": _in_parts("Why?", "So."),
                "conversation_b": _in_parts("Why?", "No."),
                "language": "en",
            },
        ],
        pairs=[(said("Why?"), "No.", "So.")],
        dropped={"non_string_content": 1, "tie": 1},
    ),
    Card(
        source="lmsys/mt_bench_human_judgments",
        types={name: _TYPES[name] for name in ("winner", "judge", "conversation_a", "conversation_b", "turn")},
        rows=[
            {
                "winner": winner,
                "judge": "author_2",
                "conversation_a": said("Why?", "So.", "Sure?", "Yes."),
                "conversation_b": said("Why?", first, "Sure?", "Well."),
                "turn": turn,
            }
            for turn, first, winner in ((1, "No.", "model_b"), (2, "So.", "model_a"))
        ],
        pairs=[(said("Why?"), "No.", "So."), (said("Why?", "So.", "Sure?"), "Yes.", "Well.")],
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "arena_conversations", tmp_path)
