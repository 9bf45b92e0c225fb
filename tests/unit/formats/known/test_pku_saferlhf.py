"""PKU-SafeRLHF, by the more helpful response."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.unit.formats.card import TEXT, Card, check, format_of, ingested, pairs_of, said, write

_TYPES = {
    "prompt": TEXT,
    "response_0": TEXT,
    "response_1": TEXT,
    "prompt_source": TEXT,
    "is_response_0_safe": pa.bool_(),
    "response_0_harm_category": pa.struct([("Privacy Violation", pa.bool_()), ("Cybercrime", pa.bool_())]),
    "response_0_severity_level": pa.int64(),
    "better_response_id": pa.int64(),
    "safer_response_id": pa.int64(),
}
_ROW = {**dict.fromkeys(_TYPES), "safer_response_id": 1, "prompt": "Why?", "response_0": "So.", "response_1": "No."}
CARDS = [
    Card(
        source="PKU-Alignment/PKU-SafeRLHF",
        types=_TYPES,
        rows=[
            {**_ROW, "better_response_id": 0, "is_response_0_safe": True, "response_0_severity_level": 0},
            {**_ROW, "better_response_id": 1},
            {**_ROW, "better_response_id": None},
            {**_ROW, "better_response_id": 2},
        ],
        pairs=[(said("Why?"), "So.", "No."), (said("Why?"), "No.", "So.")],
        dropped={"null_field": 1, "no_winner": 1},
    ),
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_it_is_taken_without_an_option(card: Card, tmp_path: Path):
    check(card, "pku_saferlhf", tmp_path)


def test_the_safer_response_is_taken_on_request(tmp_path: Path):
    row = {**_ROW, "better_response_id": 0, "safer_response_id": 1}
    path = write(Card("both are told", _TYPES, [row], []), tmp_path / "f.parquet")
    assert format_of(path).name == "pku_saferlhf"
    assert pairs_of(ingested(path, format_of(path, option="pku_saferlhf_safer").name)) == [(said("Why?"), "No.", "So.")]
