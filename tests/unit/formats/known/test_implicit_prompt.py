"""UltraFeedback binarized: a prompt beside whole dialogues."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import MESSAGES, TEXT, Card, check, said

_TYPES = {
    "prompt": TEXT,
    "prompt_id": TEXT,
    "chosen": MESSAGES,
    "rejected": MESSAGES,
    "messages": MESSAGES,
    "score_chosen": pa.float64(),
    "score_rejected": pa.float64(),
}
CARDS = [
    Card(
        source="HuggingFaceH4/ultrafeedback_binarized",
        types=_TYPES,
        rows=[
            {
                "prompt": "Why?",
                "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
                "chosen": said("Why?", "So."),
                "rejected": said("Why?", "No."),
                "messages": said("Why?", "So."),
                "score_chosen": 8.5,
                "score_rejected": 2.0,
            },
            dict.fromkeys(_TYPES),
        ],
        pairs=[(said("Why?"), "So.", "No.")],
        dropped={"null_field": 1},
    ),
    Card(
        source="a prompt of messages that the dialogues repeat",
        types={"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES},
        rows=[{"prompt": said("Why?"), "chosen": said("Why?", "So."), "rejected": said("Why?", "No.")}],
        pairs=[(said("Why?"), "So.", "No.")],
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "implicit_prompt", tmp_path)
