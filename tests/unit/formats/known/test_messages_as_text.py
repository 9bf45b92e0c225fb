"""Lists of messages in cells of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.formats.card import TEXT, Card, Pair, check, format_of, ingested, pairs_of, said, write

_TYPES = {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}
_YES, _NO = said("Why?", "So."), said("Why?", "It isn't.")
_PAIR: Pair = (said("Why?"), "So.", "It isn't.")
_BROKEN = str(_YES).replace("}, {", "}\n {")  # as numpy's arrays are printed
CARDS = [
    Card(
        source="whole dialogues as JSON, without a prompt",
        types={"chosen": TEXT, "rejected": TEXT},
        rows=[
            {"chosen": json.dumps(_YES), "rejected": json.dumps(_NO)},
            {"chosen": json.dumps(_YES), "rejected": None},
        ],
        pairs=[_PAIR],
        dropped={"null_field": 1},
    ),
    Card(
        source="UltraFeedback binarized, written to CSV by pandas",
        types={**_TYPES, "score_chosen": TEXT},
        rows=[
            {"prompt": "Why?", "chosen": str(_YES), "rejected": str(_NO), "score_chosen": "8.0"},
            {"prompt": "Why?", "chosen": _BROKEN, "rejected": str(_NO), "score_chosen": "8.0"},
        ],
        pairs=[_PAIR],
        dropped={"messages_as_text": 1},
    ),
    Card(
        source="prompt and answers as JSON, also where the answers repeat the prompt, or the prompt is plain",
        types=_TYPES,
        rows=[
            {"prompt": json.dumps(_YES[:1]), "chosen": json.dumps(_YES[1:]), "rejected": json.dumps(_NO[1:])},
            {"prompt": json.dumps(_YES[:1]), "chosen": json.dumps(_YES), "rejected": json.dumps(_NO)},
            {"prompt": "Why?", "chosen": json.dumps(_YES[1:]), "rejected": json.dumps(_NO[1:])},
            {
                "prompt": None,
                "chosen": json.dumps([{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]),
                "rejected": json.dumps(_NO),
            },
        ],
        pairs=[_PAIR] * 4,
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "messages_as_text", tmp_path)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("paired", {"prompt": json.dumps(_YES[:1]), "chosen": "So.", "rejected": "No."}),
        ("paired", {"prompt": "Why?", "chosen": str(_YES), "rejected": "No."}),
        ("unpaired", {"prompt": "Why?", "completion": json.dumps(_YES[1:]), "label": True}),
        ("ranked", {"prompt": "Why?", "completions": [str(_YES), "No."], "scores": [1, 0]}),
    ],
)
def test_a_list_in_a_text_is_nothing_that_is_said(name: str, row: dict[str, Any], tmp_path: Path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert format_of(path).name == name
    assert ingested(path, name).counters == {"read": 1, "messages_as_text": 1}


def test_json_that_is_no_message_may_be_said(tmp_path: Path):
    row = {"prompt": "Two tasks as JSON?", "chosen": '[{"content": "milk"}]', "rejected": '[{"value": 1}]'}
    path = write(Card("tasks", _TYPES, [row], []), tmp_path / "f.jsonl")
    assert format_of(path).name == "paired"
    assert pairs_of(ingested(path, "paired")) == [(said(row["prompt"]), row["chosen"], row["rejected"])]
