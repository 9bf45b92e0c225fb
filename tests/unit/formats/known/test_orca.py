"""Orca pairs, and what distilabel writes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.config import Columns
from dpo_ray.errors import DataError
from tests.unit.formats.card import MESSAGES, TEXT, Card, check, format_of, ingested, pairs_of, said, write

_DISTILABEL = {
    "system": TEXT,
    "input": TEXT,
    "chosen": TEXT,
    "rejected": TEXT,
    "generations": pa.list_(TEXT),
    "order": pa.list_(TEXT),
    "labelling_model": TEXT,
    "labelling_prompt": MESSAGES,
    "raw_labelling_response": TEXT,
    "rating": pa.list_(pa.float64()),
    "rationale": TEXT,
    "status": TEXT,
    "original_chosen": TEXT,
    "original_rejected": TEXT,
    "chosen_score": pa.float64(),
    "in_gsm8k_train": pa.bool_(),
}
CARDS = [
    Card(
        source="Intel/orca_dpo_pairs",
        types={"system": TEXT, "question": TEXT, "chosen": TEXT, "rejected": TEXT},
        rows=[
            {"system": "You are an AI assistant.", "question": "Why?", "chosen": "So it is.", "rejected": "So."},
            {"system": "", "question": "Who?", "chosen": "Me.", "rejected": "You."},
            {"system": None, "question": None, "chosen": "Me.", "rejected": "You."},
        ],
        pairs=[(said("Why?", system="You are an AI assistant."), "So it is.", "So."), (said("Who?"), "Me.", "You.")],
        dropped={"null_field": 1},
    ),
    Card(
        source="argilla/distilabel-intel-orca-dpo-pairs",
        types=_DISTILABEL,
        rows=[
            {
                **dict.fromkeys(_DISTILABEL),
                "system": "Be brief.",
                "input": "Why?",
                "chosen": "So.",
                "rejected": "No.",
                "generations": ["So.", "No."],
                "rating": [9.0, 2.0],
                "status": status,
                "in_gsm8k_train": False,
            }
            for status in ("unchanged", "tie", "swapped")
        ],
        pairs=[(said("Why?", system="Be brief."), "So.", "No.")] * 2,
        dropped={"tie": 1},
    ),
    Card(
        source="a question beside a system_prompt",
        types={"system_prompt": TEXT, "question": TEXT, "chosen": TEXT, "rejected": TEXT},
        rows=[{"system_prompt": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "No."}],
        pairs=[(said("Why?", system="Be brief."), "So.", "No.")],
    ),
    Card(
        source="distilabel: instruction, generations, rating",
        types={
            "instruction": TEXT,
            "generations": pa.list_(TEXT),
            "rating": pa.list_(pa.float64()),
            "chosen": TEXT,
            "rejected": TEXT,
        },
        rows=[
            {
                "instruction": "Why?",
                "generations": ["So.", "No."],
                "rating": [5.0, 1.0],
                "chosen": "So.",
                "rejected": "No.",
            }
        ],
        pairs=[(said("Why?"), "So.", "No.")],
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "orca", tmp_path)


def test_a_system_prompt_beside_a_prompt_is_for_whoever_knows_it_to_say(tmp_path: Path):
    types = {"system_prompt": TEXT, "prompt": TEXT, "chosen": TEXT, "rejected": TEXT}
    row = {"system_prompt": "Be brief.", "prompt": "Why?", "chosen": "So.", "rejected": "No."}
    path = write(Card("system and prompt", types, [row], []), tmp_path / "f.parquet")
    with pytest.raises(DataError, match=r"2 ways.*orca \(.*paired \(.*data\.layout=orca, or data\.layout=paired"):
        format_of(path)
    assert pairs_of(ingested(path, "orca")) == [(said("Why?", system="Be brief."), "So.", "No.")]
    assert pairs_of(ingested(path, format_of(path, option="paired").name)) == [(said("Why?"), "So.", "No.")]


def test_a_column_system_beside_a_prompt_begins_the_dialogue(tmp_path: Path):
    types = {"system": TEXT, "prompt": TEXT, "chosen": TEXT, "rejected": TEXT}
    rows = [{"system": s, "prompt": "Why?", "chosen": "So.", "rejected": "No."} for s in ("Be brief.", "", None)]
    path = write(Card("system and prompt", types, rows, []), tmp_path / "f.parquet")
    assert format_of(path).name == "paired"
    assert pairs_of(ingested(path, "paired")) == [
        (said("Why?", system="Be brief."), "So.", "No."),
        (said("Why?"), "So.", "No."),
        (said("Why?"), "So.", "No."),
    ]


def test_where_two_columns_may_be_the_question_none_is_dropped_without_a_word(tmp_path: Path):
    types = {"input": TEXT, "question": TEXT, "chosen": TEXT, "rejected": TEXT}
    row = {"input": "A passage.", "question": "What is it about?", "chosen": "So.", "rejected": "No."}
    check(Card("two questions", types, [row], [], dropped={"missing_field": 1}), "paired", tmp_path)


def test_of_several_columns_the_one_that_has_text_is_the_question(tmp_path: Path):
    types = {"input": TEXT, "question": TEXT, "chosen": TEXT, "rejected": TEXT}
    told = [(None, "Why?"), ("Who?", None), ("A passage.", "What?")]
    rows = [{"input": a, "question": b, "chosen": "So.", "rejected": "No."} for a, b in told]
    pairs = [(said("Why?"), "So.", "No."), (said("Who?"), "So.", "No.")]
    path = write(Card("one or the other", types, rows, []), tmp_path / "f.parquet")
    assert format_of(path).name == "orca"
    assert pairs_of(ingested(path, "orca")) == pairs
    assert ingested(path, "orca").counters["two_questions"] == 1
    named = ingested(path, "paired", columns=Columns(prompt="question"))  # as the reason says
    assert pairs_of(named) == [(said("Why?"), "So.", "No."), (said("What?"), "So.", "No.")]
