"""How many rows may be lost to the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_ray.errors import DataError
from dpo_ray.storage.artifact import publish
from dpo_ray.storage.location import Location
from pipelines.reference import require_enough_scored


def test_the_share_of_rows_that_could_not_be_scored_is_limited(tmp_path: Path):
    location = Location.of(tmp_path)
    counters = {"read": 40, "kept": 37, "engine_error": 1, "engine_crash": 2}
    scored = publish(location, "reference", identity={}, inputs={}, files=[], counters=counters)
    require_enough_scored(scored, 0.075)
    with pytest.raises(
        DataError, match=r"3 of 40 rows \(engine_error 1, engine_crash 2\), a share of 7\.5%, more than"
    ):
        require_enough_scored(scored, 0.07)
