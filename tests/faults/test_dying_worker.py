"""Workers whose process dies again and again, over a shard or before they have one: the stage ends, and says which."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_ray.errors import DpoRayError
from dpo_ray.on_ray.pool import Pool, ShardTask, shard_stage
from dpo_ray.on_ray.session import disconnect
from dpo_ray.on_ray.shard_worker import NOTES
from dpo_ray.shards.deaths import MOST_DEATHS
from dpo_ray.shards.output import ShardOutput
from dpo_ray.storage.location import Location

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("no_ray")]


class Dying:
    """Its process dies so often in all: of the shard 1, or of being built."""

    def __init__(self, folder: str, deaths: int, *, building: bool) -> None:
        self.folder, self.deaths, self.building = Path(folder), deaths, building
        if building:
            self._die()

    def __call__(self, source: int) -> ShardOutput:
        if source == 1 and not self.building:
            self._die()
        return ShardOutput(pa.table({"x": [source]}), {"read": 1})

    def _die(self) -> None:
        died = len(list(self.folder.iterdir()))
        if died < self.deaths:
            (self.folder / str(died)).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def stage(folder: Path, deaths: int, stateless: bool, building: bool) -> Any:
    (folder / "deaths").mkdir()
    arguments = {"folder": str(folder / "deaths"), "deaths": deaths, "building": building}
    tasks = [ShardTask(source=n, content=str(n), rows=1) for n in range(3)]
    pool = Pool(Dying, arguments, stateless=stateless, num_actors=1)
    try:
        made, _ = shard_stage(
            Location.of(folder / "out"), "numbers", identity={}, inputs={}, tasks=tasks, pool=pool, unit="rows"
        )
        return made
    finally:
        disconnect()


@pytest.mark.parametrize(
    ("stateless", "building"),
    [
        (True, False),
        pytest.param(False, False, marks=pytest.mark.long),
        pytest.param(False, True, marks=pytest.mark.long),
    ],
)
def test_a_worker_that_dies_for_ever_ends_the_stage(tmp_path: Path, monkeypatch: Any, stateless: bool, building: bool):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    named = "to start Dying" if building else "the shard"
    with pytest.raises(DpoRayError, match=rf"All of {MOST_DEATHS} processes died that tried {named}"):
        stage(tmp_path, 1000, stateless, building)
    assert len(list((tmp_path / "deaths").iterdir())) == MOST_DEATHS


def test_one_that_dies_twice_is_started_again_and_leaves_no_note(tmp_path: Path, monkeypatch: Any):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = stage(tmp_path, 2, False, True)
    assert made.manifest.counters["kept"] == 3
    assert list(made.location.children()) and (made.location / NOTES).children() == []
