"""HelpSteer2's and HelpSteer3's preferences between two responses."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import MESSAGES, TEXT, Card, check, said

_OLD = {
    "split": TEXT,
    "prompt": TEXT,
    "response_1": TEXT,
    "response_2": TEXT,
    "preference_strength": pa.int64(),
    "preference_statement": TEXT,
}
_JUDGED = pa.list_(pa.struct([("score", pa.int64()), ("reasoning", TEXT), ("feedback1", TEXT), ("feedback2", TEXT)]))
_NEW = {
    "domain": TEXT,
    "language": TEXT,
    "context": MESSAGES,
    "response1": TEXT,
    "response2": TEXT,
    "overall_preference": pa.int64(),
    "individual_preference": _JUDGED,
}
_STRENGTHS = (-3, 1, 0, None, 7)
CARDS = [
    Card(
        source="nvidia/HelpSteer2: preference",
        types=_OLD,
        rows=[
            {
                **dict.fromkeys(_OLD),
                "prompt": "Hi.\n\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?" if n else "Why?",
                "response_1": "So.",
                "response_2": "No.",
                "preference_strength": n,
            }
            for n in (*_STRENGTHS, -1)
        ],
        pairs=[
            (said("Hi.", "Hello.", "Why?"), "So.", "No."),
            (said("Hi.", "Hello.", "Why?"), "No.", "So."),
            (said("Hi.", "Hello.", "Why?"), "So.", "No."),
        ],
        dropped={"tie": 1, "null_field": 1, "no_winner": 1},
    ),
    Card(
        source="nvidia/HelpSteer3: preference",
        types=_NEW,
        rows=[
            {
                **dict.fromkeys(_NEW),
                "context": said("Hi.", "Hello.", "Why?"),
                "response1": "So.",
                "response2": "No.",
                "overall_preference": n,
            }
            for n in _STRENGTHS
        ],
        pairs=[(said("Hi.", "Hello.", "Why?"), "So.", "No."), (said("Hi.", "Hello.", "Why?"), "No.", "So.")],
        dropped={"tie": 1, "null_field": 1, "no_winner": 1},
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "helpsteer_preference", tmp_path)
