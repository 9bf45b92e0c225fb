"""The formats that TRL has too: the same messages as its trainers prepare, and the same ids up to the end of the turn.

What TRL makes of the cards' rows is written down in trl.json, by tests/integrations/trl_rows.py; a test there holds
that file against TRL itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dpo_ray.data.chat import completion_ids, prompt_ids
from tests.unit.formats.card import Card, ingested, pairs_of, said, write
from tests.unit.formats.known.cards import CARDS

GOLDEN = Path(__file__).parent / "trl.json"
FORMATS = ("paired", "implicit_prompt", "implicit_text", "unpaired")
WITHOUT = ("a prompt of messages that the dialogues repeat",)
"""Of these TRL trains on the prompt twice."""
ANSWERS = ("chosen", "rejected", "completion")


def given() -> list[dict[str, Any]]:
    """The rows of those formats that make a pair here, each with the trainer that takes such."""
    found = []
    for name in FORMATS:
        for card in (card for card in CARDS[name] if card.source not in WITHOUT):
            # A row that is dropped here for a null or for what it lacks makes TRL stop.
            rows = [row for row in card.rows if _is_kept(row)]
            found.append({"format": name, "source": card.source, "trainer": _trainer(name), "rows": rows})
    return found


def _trainer(name: str) -> str:
    return "kto" if name == "unpaired" else "dpo"


def _is_kept(row: dict[str, Any]) -> bool:
    sides = [row[name] for name in (*ANSWERS, "label") if name in row]
    return all(side is not None and side != [] for side in sides) and row.get("chosen") not in ("Yes.", "It is so")


def content(value: Any) -> str:
    """What is said in a completion: TRL leaves text as text."""
    return value if isinstance(value, str) else value[0]["content"]


def cases() -> list[Any]:
    written = json.loads(GOLDEN.read_text())
    return [pytest.param(one, made, id=one["source"]) for one, made in zip(given(), written, strict=True)]


@pytest.mark.parametrize(("one", "made"), cases())
def test_the_messages_are_those_that_trl_makes(one: dict[str, Any], made: list[dict[str, Any]], tmp_path: Path):
    card = next(card for card in CARDS[one["format"]] if card.source == one["source"])
    path = write(Card(card.source, card.types, one["rows"], []), tmp_path / "f.parquet")
    pairs = pairs_of(ingested(path, one["format"]))
    assert len(pairs) == len(made) > 0
    for (prompt, chosen, rejected), row in zip(pairs, made, strict=True):
        fields = row["fields"]
        assert prompt == (said(fields["prompt"]) if isinstance(fields["prompt"], str) else fields["prompt"])
        if one["format"] == "unpaired":
            expected = content(fields["completion"])
            assert (chosen, rejected) == ((expected, None) if fields["label"] else (None, expected))
        else:
            assert (chosen, rejected) == (content(fields["chosen"]), content(fields["rejected"]))


@pytest.mark.parametrize(("one", "made"), [case for case in cases() if case.values[1][0]["ids"] is not None])
def test_the_ids_are_those_of_trl_up_to_what_follows_the_end_of_the_turn(
    one: dict[str, Any], made: list[dict[str, Any]], demo_model: Path
):
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for row in made:
        fields, ids = row["fields"], row["ids"]
        assert prompt_ids(tokenizer, fields["prompt"]) == ids["prompt_ids"]
        for side in (name for name in ANSWERS if name in fields):
            ours = completion_ids(tokenizer, fields["prompt"], content(fields[side]))
            assert ours[-1] == tokenizer.eos_token_id
            assert ours + newline == ids[f"{side}_ids"]
