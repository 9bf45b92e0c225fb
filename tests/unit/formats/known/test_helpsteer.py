"""HelpSteer's answers, a row each."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dpo_ray.config import Data
from dpo_ray.data.raw.files import Stamp
from dpo_ray.data.raw.scan import scan
from dpo_ray.formats.registry import formats
from dpo_ray.shards.ingest import IngestShard
from dpo_ray.storage.location import Location
from pipelines.ingest import Side, _tasks
from tests.unit.formats.card import TEXT, Card, check, pairs_of, said, write

_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_TYPES = {"prompt": TEXT, "response": TEXT, **dict.fromkeys(_ATTRIBUTES, pa.int64())}

_DIALOGUE = "Hi.\n\n<extra_id_1>Assistant\nHello.\n\nSo?\n<extra_id_1>User\nWho?"
"""A prompt of several turns, as the card spells it."""


def _row(prompt: str | None, response: str, helpfulness: int | None) -> dict[str, object]:
    return {**dict.fromkeys(_TYPES, 2), "prompt": prompt, "response": response, "helpfulness": helpfulness}


CARDS = [
    Card(
        source="nvidia/HelpSteer2",
        types=_TYPES,
        rows=[
            _row("Why?", "So.", 4),
            _row("Why?", "No.", 1),
            _row(_DIALOGUE, "You.", 0),
            _row(_DIALOGUE, "Me.", 3),
            _row(_DIALOGUE, "Us.", 2),
            _row("How?", "So.", 2),
            _row("How?", "No.", 2),
            _row("When?", "Now.", 4),
            _row("Where?", "Here.", None),
            _row("Where?", "There.", 1),
            _row(None, "So.", 1),
            _row(None, "No.", 2),
        ],
        pairs=[(said("Why?"), "So.", "No."), (said("Hi.", "Hello.\n\nSo?", "Who?"), "Me.", "You.")],
        dropped={"read": 7, "tie": 1, "too_few_distinct": 1, "bad_scores": 1, "null_field": 2},
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "helpsteer", tmp_path)


@pytest.mark.parametrize("name", ["f.parquet", "f.jsonl", "f.json", "f.arrow"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100])
def test_answers_are_joined_alike_however_the_file_is_cut(tmp_path: Path, name: str, rows: int):
    [card] = CARDS
    stamp, folder = Stamp.of(Location.of(write(card, tmp_path / name))), Location.of(tmp_path / "files")
    record = scan(stamp, rows, folder)
    tasks = _tasks(record, formats()["helpsteer"], folder, Side("data.train", [], None), Data())
    outputs = [IngestShard(0.0, 0)(task.source) for task in tasks]
    assert len(tasks) == -(-len(card.rows) // rows)
    assert [pair for output in outputs for pair in pairs_of(output)] == card.pairs
    assert sum((output.counters for output in outputs), start=outputs[0].counters - outputs[0].counters) == card.dropped
