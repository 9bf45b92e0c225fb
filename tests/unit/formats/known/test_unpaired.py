"""The unpaired preferences of TRL."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import MESSAGES, TEXT, Card, check, said

CARDS = [
    Card(
        source="TRL: standard, unpaired",
        types={"prompt": TEXT, "completion": TEXT, "label": pa.bool_(), "model": TEXT},
        rows=[
            {"prompt": "The sky is", "completion": " blue.", "label": True, "model": None},
            {"prompt": "The sky is", "completion": " green.", "label": False, "model": "m"},
            {"prompt": "The sky is", "completion": " red.", "label": None, "model": "m"},
        ],
        pairs=[(said("The sky is"), " blue.", None), (said("The sky is"), None, " green.")],
        dropped={"null_field": 1},
    ),
    Card(
        source="TRL: conversational, unpaired",
        types={"prompt": MESSAGES, "completion": MESSAGES, "label": pa.int64()},
        rows=[{"prompt": said("Why?"), "completion": said("", "So.")[1:], "label": 0}],
        pairs=[(said("Why?"), None, "So.")],
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "unpaired", tmp_path)
