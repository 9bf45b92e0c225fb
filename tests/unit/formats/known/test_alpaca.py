"""Alpaca-like preferences of LLaMA-Factory."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import TEXT, Card, check, said

CARDS = [
    Card(
        source="LLaMA-Factory: alpaca, ranking",
        types={
            "instruction": TEXT,
            "input": TEXT,
            "chosen": TEXT,
            "rejected": TEXT,
            "system": TEXT,
            "history": pa.list_(pa.list_(TEXT)),
        },
        rows=[
            {
                "instruction": "Translate.",
                "input": "Hallo",
                "chosen": "Hello",
                "rejected": "Bye",
                "system": "Be brief.",
                "history": [["Who?", "Me."]],
            },
            {"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No.", "system": None, "history": []},
            {"instruction": "Why?", "input": None, "chosen": "So.", "rejected": None, "system": "", "history": None},
        ],
        pairs=[
            (said("Who?", "Me.", "Translate.\nHallo", system="Be brief."), "Hello", "Bye"),
            (said("Why?"), "So.", "No."),
        ],
        dropped={"null_field": 1},
    ),
    Card(
        source="LLaMA-Factory: alpaca, earlier turns without an input",
        types={"instruction": TEXT, "chosen": TEXT, "rejected": TEXT, "history": pa.list_(pa.list_(TEXT))},
        rows=[
            {"instruction": "Why?", "chosen": "So.", "rejected": "No.", "history": [["Who?", "Me."]]},
            {"instruction": "Why?", "chosen": "So.", "rejected": "No.", "history": None},
        ],
        pairs=[(said("Who?", "Me.", "Why?"), "So.", "No."), (said("Why?"), "So.", "No.")],
    ),
    Card(
        source="LLaMA-Factory: alpaca, the four columns",
        types={"instruction": TEXT, "input": TEXT, "chosen": TEXT, "rejected": TEXT},
        rows=[{"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."}],
        pairs=[(said("Why?"), "So.", "No.")],
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "alpaca", tmp_path)
