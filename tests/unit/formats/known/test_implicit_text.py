"""TRL's plain texts whose prompt is what they share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.formats.card import TEXT, Card, check, format_of, ingested, pairs_of, said, write

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


@pytest.mark.parametrize("column", ["problem", "Prompt", "Question", "user_input", "query_text", "post", "text"])
def test_answers_that_begin_alike_are_no_prompt_where_a_column_has_it(column: str, tmp_path: Path):
    types = {column: TEXT, "chosen": TEXT, "rejected": TEXT}
    row = {column: "What is 2 + 2?", "chosen": "To solve this, add: 4", "rejected": "To solve this, guess: 5"}
    path = write(Card("steps", types, [row], []), tmp_path / "f.jsonl")
    assert format_of(path).name == "paired"
    assert ingested(path, "paired").counters == {"read": 1, "missing_field": 1}
    assert format_of(path, names={"prompt": column}).name == "paired"


def test_ids_and_notes_beside_the_texts_do_no_harm(tmp_path: Path):
    row = {
        "prompt_id": "a83",
        "source": "a text of ours",
        "chosen": "The sky is blue.",
        "rejected": "The sky is green.",
    }
    path = write(Card("ids", dict.fromkeys(row, TEXT), [row], []), tmp_path / "f.jsonl")
    assert format_of(path).name == "implicit_text"
    assert pairs_of(ingested(path, "implicit_text")) == [(said("The sky is"), " blue.", " green.")]
