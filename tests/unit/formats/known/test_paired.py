"""The preferences of TRL whose prompt stands in a column, or whose answers are whole dialogues."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import MESSAGES, TEXT, Card, check, said

_WHY = said("Why?")
CARDS = [
    Card(
        source="TRL: standard, explicit prompt",
        types={"prompt": TEXT, "chosen": TEXT, "rejected": TEXT, "margin_note": TEXT},
        rows=[
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "margin_note": None},
            {"prompt": "The sky is", "chosen": None, "rejected": " green.", "margin_note": "x"},
        ],
        pairs=[(said("The sky is"), " blue.", " green.")],
        dropped={"null_field": 1},
    ),
    Card(
        source="TRL: conversational, explicit prompt",
        types={"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, "score": pa.float64()},
        rows=[
            {"prompt": _WHY, "chosen": said("", "So.")[1:], "rejected": said("", "No.")[1:], "score": None},
            {"prompt": _WHY, "chosen": [], "rejected": said("", "No.")[1:], "score": 1.5},
        ],
        pairs=[(_WHY, "So.", "No.")],
        dropped={"empty_response": 1},
    ),
    Card(
        source="TRL: conversational, implicit prompt",
        types={"chosen": MESSAGES, "rejected": MESSAGES, "chosen_rating": pa.float64(), "dataset": TEXT},
        rows=[{"chosen": said("Why?", "So."), "rejected": said("Why?", "No."), "chosen_rating": 4.5, "dataset": "d"}],
        pairs=[(_WHY, "So.", "No.")],
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "paired", tmp_path)
