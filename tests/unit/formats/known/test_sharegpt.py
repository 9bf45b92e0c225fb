"""ShareGPT's dialogues with two answers, of LLaMA-Factory and axolotl."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import MESSAGES, TEXT, Card, check, said

_TURN = pa.struct([("from", TEXT), ("value", TEXT)])
CARDS = [
    Card(
        source="LLaMA-Factory: dpo_en_demo",
        types={"conversations": pa.list_(_TURN), "chosen": _TURN, "rejected": _TURN},
        rows=[
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Hi."},
                    {"from": "gpt", "value": "Hello."},
                    {"from": "human", "value": "Why?"},
                ],
                "chosen": {"from": "gpt", "value": "So."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            {
                "conversations": [{"from": "human", "value": "Why?"}],
                "chosen": {"from": "gpt", "value": "So."},
                "rejected": None,
            },
            {
                "conversations": [{"from": "human", "value": None}],
                "chosen": {"from": "gpt", "value": "So."},
                "rejected": {"from": "gpt", "value": "No."},
            },
        ],
        pairs=[(said("Hi.", "Hello.", "Why?", system="Be brief."), "So.", "No.")],
        dropped={"null_field": 2},
    ),
    Card(
        source="axolotl: chat_template.default",
        types={"messages": MESSAGES, "chosen": MESSAGES.value_type, "rejected": MESSAGES.value_type, "system": TEXT},
        rows=[
            {
                "messages": said("Why?"),
                "chosen": {"role": "assistant", "content": "So."},
                "rejected": {"role": "assistant", "content": "No."},
                "system": "Be brief.",
            }
        ],
        pairs=[(said("Why?", system="Be brief."), "So.", "No.")],
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "sharegpt", tmp_path)
