"""HH-RLHF's transcripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.formats.card import TEXT, Card, check, said

_CHOSEN = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why is it blue?\n\nAssistant: By scattering."
_REJECTED = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why is it blue?\n\nAssistant: No idea.\n\nSorry."
CARDS = [
    Card(
        source="Anthropic/hh-rlhf",
        types={"chosen": TEXT, "rejected": TEXT},
        rows=[
            {"chosen": _CHOSEN, "rejected": _REJECTED},
            {"chosen": "\n\nHuman: Who?\n\nAssistant: Me.", "rejected": "\n\nHuman: Who?\n\nAssistant:"},
            {"chosen": "\n\nHuman: A?\n\nAssistant: Yes.", "rejected": "\n\nHuman: A?\n\nAssistant: No."},
            {"chosen": None, "rejected": _REJECTED},
            {"chosen": "Who?", "rejected": "\n\nHuman: Who?\n\nAssistant: Me."},
            {
                "chosen": "\n\nHuman: A?\n\nHuman: B?\n\nAssistant: C",
                "rejected": "\n\nHuman: A?\n\nHuman: B?\n\nAssistant: D",
            },
        ],
        pairs=[
            (said("Hi.", "Hello.", "Why is it blue?"), "By scattering.", "No idea.\n\nSorry."),
            (said("A?"), "Yes.", "No."),
        ],
        dropped={"empty_response": 1, "null_field": 1, "bad_transcript": 1, "role_order": 1},
    ),
    Card(
        source="transcripts whose outer white space was stripped off, and with CRLF",
        types={"chosen": TEXT, "rejected": TEXT},
        rows=[
            {"chosen": _CHOSEN.strip(), "rejected": _REJECTED.strip()},
            {"chosen": _CHOSEN.replace("\n", "\r\n"), "rejected": _REJECTED.replace("\n", "\r\n")},
        ],
        pairs=[
            (said("Hi.", "Hello.", "Why is it blue?"), "By scattering.", "No idea.\n\nSorry."),
            (said("Hi.", "Hello.", "Why is it blue?"), "By scattering.", "No idea.\r\n\r\nSorry."),
        ],
    ),
    Card(
        source="stripped transcripts as prompts",
        types={"prompt": TEXT, "chosen": TEXT, "rejected": TEXT},
        rows=[{"prompt": "Human: Who?\n\nAssistant:", "chosen": "Me.", "rejected": "You."}],
        pairs=[(said("Who?"), "Me.", "You.")],
    ),
    Card(
        source="transcripts as prompts",
        types={"prompt": TEXT, "chosen": TEXT, "rejected": TEXT},
        rows=[{"prompt": "\n\nHuman: Who?\n\nAssistant:", "chosen": " Me.", "rejected": " You."}],
        pairs=[(said("Who?"), "Me.", "You.")],
    ),
    Card(
        source="transcripts beside a prompt that they repeat",
        types={"prompt": TEXT, "chosen": TEXT, "rejected": TEXT},
        rows=[
            {
                "prompt": "Who?",
                "chosen": "\n\nHuman: Who?\n\nAssistant: Me.",
                "rejected": "\n\nHuman: Who?\n\nAssistant: You.",
            }
        ],
        pairs=[(said("Who?"), "Me.", "You.")],
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "hh_rlhf", tmp_path)
