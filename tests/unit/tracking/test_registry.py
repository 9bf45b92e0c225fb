"""A registered model that follows the pointer of a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_ray.storage.location import Location
from dpo_ray.tracking.registry import follow_move


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_record_is_told_of_and_stops_no_move(content: str, tmp_path: Path):
    (tmp_path / "mlflow.json").write_text(content)
    told: list[str] = []
    follow_move(Location.of(tmp_path), "v2", told.append)
    [line] = told
    assert "was not moved" in line and "The pointer was" in line and "`dpo-ray promote` with v2" in line


def test_a_name_that_no_registry_follows_says_nothing(tmp_path: Path):
    told: list[str] = []
    follow_move(Location.of(tmp_path), "v2", told.append)
    assert told == []
