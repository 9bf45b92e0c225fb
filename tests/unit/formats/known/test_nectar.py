"""Nectar's ranked answers."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import TEXT, Card, check, said

_TYPES = {
    "prompt": TEXT,
    "answers": pa.list_(pa.struct([("answer", TEXT), ("model", TEXT), ("rank", pa.float64())])),
    "turns": pa.int64(),
    "num_responses": pa.int64(),
    "source": pa.list_(TEXT),
    "good_natured": pa.bool_(),
}


def _row(prompt: str, *ranked: tuple[str, float | None]) -> dict[str, object]:
    answers = [{"answer": answer, "model": "m", "rank": rank} for answer, rank in ranked]
    return {**dict.fromkeys(_TYPES), "prompt": prompt, "answers": answers, "turns": 1, "source": ["sharegpt"]}


CARDS = [
    Card(
        source="berkeley-nest/Nectar",
        types=_TYPES,
        rows=[
            _row("\n\nHuman: Why?\n\nAssistant: ", ("So.", 2.0), ("So it is.", 1.0), ("No.", 3.0)),
            _row("\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: ", ("So.", 1.0), ("No.", 2.0)),
            _row("\n\nHuman: Why?\n\nAssistant: ", ("So.", 1.0), ("No.", None)),
            _row("\n\nHuman: Why?\n\nAssistant: ", ("So.", 1.0), ("No.", 1.0)),
            dict.fromkeys(_TYPES),
        ],
        pairs=[(said("Why?"), "So it is.", "No."), (said("Hi.", "Hello.", "Why?"), "So.", "No.")],
        dropped={"bad_scores": 1, "tie": 1, "null_field": 1},
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "nectar", tmp_path)
