"""TRL's plain texts whose prompt is what they share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.formats.card import TEXT, Card, check, said

CARDS = [
    Card(
        source="TRL: standard, implicit prompt",
        types={"chosen": TEXT, "rejected": TEXT, "source": TEXT},
        rows=[
            {"chosen": "The sky is blue.", "rejected": "The sky is green.", "source": "trl"},
            {"chosen": "The sun is in the sky.", "rejected": "The sun is in the sea.", "source": None},
            {"chosen": "Yes.", "rejected": "No.", "source": None},
            {"chosen": "It is so", "rejected": "It is so.", "source": None},
            {"chosen": None, "rejected": "No.", "source": None},
        ],
        pairs=[(said("The sky is"), " blue.", " green."), (said("The sun is in the s"), "ky.", "ea.")],
        dropped={"missing_field": 1, "empty_response": 1, "null_field": 1},
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "implicit_text", tmp_path)
