"""Answers with scores, in this project's own columns."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import TEXT, Card, check, said

CARDS = [
    Card(
        source="prompt, completions, scores",
        types={"prompt": TEXT, "completions": pa.list_(TEXT), "scores": pa.list_(pa.float64()), "id": pa.int64()},
        rows=[
            {"prompt": "Why?", "completions": ["No.", "So.", "Perhaps."], "scores": [1.0, 3.0, 2.0], "id": 1},
            {"prompt": "Why?", "completions": ["No.", "So."], "scores": [1.0, 1.0], "id": 2},
            {"prompt": "Why?", "completions": ["No.", "So."], "scores": None, "id": None},
        ],
        pairs=[(said("Why?"), "So.", "No.")],
        dropped={"tie": 1, "null_field": 1},
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "ranked", tmp_path)
