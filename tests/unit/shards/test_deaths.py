"""Work that every process dies of is given up, and what was only interrupted is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_ray.errors import DpoRayError
from dpo_ray.shards.deaths import MOST_DEATHS, Deaths
from dpo_ray.storage.location import Location


def deaths(folder: Path, run: str = "run") -> Deaths:
    return Deaths(Location.of(folder / "attempts" / "a.json"), "the shard a", run)


def test_after_so_many_deaths_it_is_given_up_by_name_and_may_be_tried_anew(tmp_path: Path):
    for _ in range(MOST_DEATHS):
        deaths(tmp_path).begin()  # and the process dies
    with pytest.raises(DpoRayError, match=rf"All of {MOST_DEATHS} processes died that tried the shard a \("):
        deaths(tmp_path).begin()
    deaths(tmp_path).begin()


@pytest.mark.parametrize("ends", [True, False])
def test_an_attempt_that_ends_or_raises_is_no_death(tmp_path: Path, ends: bool):
    for _ in range(2 * MOST_DEATHS):
        try:
            with deaths(tmp_path).attempt():
                if not ends:
                    raise ValueError("bad row")
        except ValueError:
            pass
    assert list((tmp_path / "attempts").iterdir()) == []


def test_those_of_another_run_do_not_count(tmp_path: Path):
    for run in range(2 * MOST_DEATHS):
        deaths(tmp_path, str(run)).begin()
    assert len(json.loads((tmp_path / "attempts" / "a.json").read_text())["hosts"]) == 1


def test_a_damaged_note_is_none(tmp_path: Path):
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "a.json").write_text('{"run": "run", "hosts')
    deaths(tmp_path).begin()
    assert json.loads((tmp_path / "attempts" / "a.json").read_text())["run"] == "run"
