"""Formats in CSV, where every cell is text: numbers, truth values and lists are read as JSON, texts stay texts."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from tests.unit.formats.card import Pair, format_of, ingested, pairs_of, said


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("name", "rows", "pairs"),
    [
        (
            "paired",
            [
                {"prompt": "6 * 7?", "chosen": "42", "rejected": "[41]"},
                {"prompt": "True?", "chosen": "1", "rejected": "0"},
            ],
            [(said("6 * 7?"), "42", "[41]"), (said("True?"), "1", "0")],
        ),
        (
            "hh_rlhf",
            [{"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}],
            [(said("Why?"), "So.", "No.")],
        ),
        (
            "unpaired",
            [{"prompt": "Why?", "completion": "3", "label": label} for label in ("True", "false", "1")],
            [(said("Why?"), "3", None), (said("Why?"), None, "3"), (said("Why?"), "3", None)],
        ),
        (
            "ranked",
            [{"prompt": "Why?", "completions": '["So.", "No."]', "scores": "[2, 1.5]"}],
            [(said("Why?"), "So.", "No.")],
        ),
        (
            "pku_saferlhf",
            [{"prompt": "Why?", "response_0": "So.", "response_1": "No.", "better_response_id": "1"}],
            [(said("Why?"), "No.", "So.")],
        ),
        (
            "helpsteer",
            [{"prompt": "Why?", "response": r, "helpfulness": s} for r, s in (("No.", "1"), ("So.", "4"))],
            [(said("Why?"), "So.", "No.")],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_format_is_taken_from_csv(tmp_path: Path, name: str, rows: list[dict[str, Any]], pairs: list[Pair]):
    path = write(tmp_path / "f.csv", rows)
    assert format_of(path).name == name
    assert pairs_of(ingested(path, name)) == pairs


def test_what_is_no_truth_value_is_no_label(tmp_path: Path):
    row = {"prompt": "Why?", "completion": "So."}
    path = write(tmp_path / "f.csv", [{**row, "label": "true"}, {**row, "label": "good"}, {**row, "label": ""}])
    assert ingested(path, "unpaired").counters == {"read": 3, "bad_label": 1, "null_field": 1}
