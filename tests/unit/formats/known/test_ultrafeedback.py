"""UltraFeedback's scored completions."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import TEXT, Card, check, said

_ASPECT = pa.struct([("Rating", TEXT), ("Rationale", TEXT)])
_TYPES = {
    "source": TEXT,
    "instruction": TEXT,
    "models": pa.list_(TEXT),
    "completions": pa.list_(
        pa.struct(
            [
                ("annotations", pa.struct([("helpfulness", _ASPECT), ("honesty", _ASPECT)])),
                ("custom_system_prompt", TEXT),
                ("model", TEXT),
                ("principle", TEXT),
                ("response", TEXT),
                ("critique", TEXT),
                ("overall_score", pa.float64()),
                ("fine-grained_score", pa.float64()),
            ]
        )
    ),
    "correct_answers": pa.list_(TEXT),
    "incorrect_answers": pa.list_(TEXT),
}


def _row(*scored: tuple[str, float | None]) -> dict[str, object]:
    completions = [
        {"response": response, "overall_score": score, "annotations": {"helpfulness": {"Rating": "4"}}}
        for response, score in scored
    ]
    return {**dict.fromkeys(_TYPES), "instruction": "Why?", "completions": completions, "models": ["a", "b"]}


CARDS = [
    Card(
        source="openbmb/UltraFeedback",
        types=_TYPES,
        rows=[
            _row(("No.", 3.0), ("So.", 8.5), ("Perhaps.", 5.0), ("Who?", 4.0)),
            _row(("No.", 3.0), ("So.", 3.0)),
            _row(("No.", 3.0), ("So.", None)),
            _row(),
            dict.fromkeys(_TYPES),
        ],
        pairs=[(said("Why?"), "So.", "No.")],
        dropped={"tie": 1, "bad_scores": 1, "empty_response": 1, "null_field": 1},
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "ultrafeedback", tmp_path)
