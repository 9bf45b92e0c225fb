"""Dialogues with a label, of LLaMA-Factory."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import MESSAGES, TEXT, Card, check, said

_SHAREGPT = pa.list_(pa.struct([("from", TEXT), ("value", TEXT)]))
CARDS = [
    Card(
        source="LLaMA-Factory: kto_en_demo",
        types={"messages": MESSAGES, "label": pa.bool_()},
        rows=[
            {"messages": said("Why?", "So."), "label": True},
            {"messages": said("Hi.", "Hello.", "Why?", "No."), "label": False},
            {"messages": said("Why?", "So."), "label": None},
            {"messages": None, "label": True},
            {"messages": said("Why?"), "label": True},
        ],
        pairs=[(said("Why?"), "So.", None), (said("Hi.", "Hello.", "Why?"), None, "No.")],
        dropped={"null_field": 2, "empty_prompt": 1},
    ),
    Card(
        source="LLaMA-Factory: sharegpt with kto_tag",
        types={"conversations": _SHAREGPT, "kto_tag": pa.bool_(), "system": TEXT},
        rows=[
            {
                "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}],
                "kto_tag": True,
                "system": None,
            }
        ],
        pairs=[(said("Why?"), "So.", None)],
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "kto_messages", tmp_path)
