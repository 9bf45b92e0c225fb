"""Chatbot Arena's human preferences: two responses, a winner or a tie."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import TEXT, Card, check, said

_55K = {
    "id": pa.int64(),
    "model_a": TEXT,
    "model_b": TEXT,
    "prompt": TEXT,
    "response_a": TEXT,
    "response_b": TEXT,
    "winner_model_a": pa.int64(),
    "winner_model_b": pa.int64(),
    "winner_tie": pa.int64(),
}


def _row_55k(prompt: str, one: str, other: str, *winner: int) -> dict[str, object]:
    return dict(zip(_55K, [7, "gpt-4", "llama-2", prompt, one, other, *winner], strict=True))


CARDS = [
    Card(
        source="lmsys/lmsys-arena-human-preference-55k",
        types=_55K,
        rows=[
            _row_55k('["Why?"]', '["So."]', '["No."]', 1, 0, 0),
            _row_55k('["Why?"]', '["So."]', '["No."]', 0, 1, 0),
            _row_55k('["Why?"]', '["So."]', '["No."]', 0, 0, 1),
            _row_55k('["Hi.", "Why?"]', '["Hello.", "So."]', '["Hello.", "No."]', 1, 0, 0),
            _row_55k('["Hi.", "Why?"]', '["Hello."]', '["Hello.", "No."]', 1, 0, 0),
            _row_55k('["Why?"]', "[null]", '["No."]', 0, 1, 0),
            _row_55k('["Why?"]', '["So."]', '["No."]', 0, 0, 0),
        ],
        pairs=[
            (said("Why?"), "So.", "No."),
            (said("Why?"), "No.", "So."),
            (said("Hi.", "Hello.", "Why?"), "So.", "No."),
        ],
        dropped={"tie": 1, "role_order": 1, "null_field": 1, "no_winner": 1},
    ),
    Card(
        source="prompt, response_a, response_b, winner",
        types={"prompt": TEXT, "response_a": TEXT, "response_b": TEXT, "winner": TEXT, "judge": TEXT},
        rows=[
            {"prompt": "Why?", "response_a": "So.", "response_b": "No.", "winner": winner, "judge": None}
            for winner in ("model_a", "B", "tie", "tie (bothbad)", None, "nobody")
        ],
        pairs=[(said("Why?"), "So.", "No."), (said("Why?"), "No.", "So.")],
        dropped={"tie": 2, "null_field": 1, "no_winner": 1},
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "arena", tmp_path)
