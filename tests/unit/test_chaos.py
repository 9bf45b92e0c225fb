"""What tests/chaos measures, on a trace and on folders of a test's own: no fault comes here, and no Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_ray.errors import DataError
from dpo_ray.storage.artifact import open_artifact
from dpo_ray.storage.location import Location
from dpo_ray.storage.shard_pool import read_whole_shard
from tests.chaos.cells import Cell, rows_of
from tests.chaos.clock import wrong_clock
from tests.chaos.cluster import HERE
from tests.chaos.job import copy_before, differences, state
from tests.chaos.test_storage import spoil
from tests.chaos.trace import Trace
from tests.shard_stages import stage


def traced(folder: Path, *lines: tuple[float, str, str, str]) -> Trace:
    """Of (at, what, name, event)."""
    file = folder / "trace.jsonl"
    noted = [dict(zip(("at", "what", "name", "event"), line, strict=True), pid=1, node="one") for line in lines]
    file.write_text("".join(json.dumps(one) + "\n" for one in noted))
    return Trace(file, since=1.0)


def test_what_is_begun_twice_is_done_again_and_a_step_counts_once_for_all_workers(tmp_path: Path):
    trace = traced(
        tmp_path,
        (0.5, "shard", "pairs/a", "begun"),  # of an earlier run
        (1.0, "shard", "pairs/a", "begun"),
        (2.0, "shard", "pairs/a", "begun"),
        (3.0, "shard", "pairs/b", "begun"),
        *((4.0, "step", f"{rank}/7", "begun") for rank in (0, 1, 0, 1)),
        *((5.0, "publish", "copy", "begun") for _ in range(2)),
    )
    assert trace.again() == {("shard", "pairs/a"): 1, ("step", "0/7"): 1}


def test_new_work_is_what_was_not_done_before_nor_is_done_again(tmp_path: Path):
    taken = [
        (2.0, "0/1"),
        (3.0, "0/2"),
        (4.2, "0/3"),
        (5.0, "0/2"),
        (6.0, "0/3"),
        (7.0, "1/4"),
        (7.5, "0/4"),
        (9.0, "0/5"),
    ]
    lines = [(at + late, "step", name, event) for at, name in taken for late, event in ((0.0, "begun"), (0.1, "done"))]
    trace = traced(tmp_path, *lines)
    assert trace.new_work_after(4.0) == 7.6  # and not step 3 at 4.3, after which its worker died
    assert trace.new_work_after(9.5) is None


def test_an_output_folder_is_told_from_another_one_by_what_is_in_it(tmp_path: Path):
    one, other = (Location.of(tmp_path / name) for name in ("one", "other"))
    made, _ = stage(one, [1, 2, 3])
    stage(other, [1, 2, 3])
    assert state(one) and not differences(state(one), state(other))
    stage(other, [4])
    assert len(differences(state(one), state(other))) == len(differences(state(other), state(one))) == 1
    spoil(Path(made.shards()[0].uri), "flipped")
    with pytest.raises(AssertionError, match="whose bytes are not those of its manifest"):
        state(one)


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_spoilt_shard_is_found_and_made_again(tmp_path: Path, damage: str):
    output = Location.of(tmp_path)
    made, _ = stage(output, [1, 2])
    before = state(output)
    times = Path(made.shards()[0].uri).stat().st_mtime_ns
    spoil(Path(made.shards()[0].uri), damage)
    assert Path(made.shards()[0].uri).stat().st_mtime_ns == times
    with pytest.raises(DataError, match="was damaged"):
        read_whole_shard(made.shards()[0])
    _, reused = stage(output, [1, 2])
    assert not reused and not differences(state(output), before)


def test_one_that_was_cut_off_is_made_again_before_anybody_reads_it(tmp_path: Path):
    output = Location.of(tmp_path)
    made, _ = stage(output, [1, 2])
    before = state(output)
    spoil(Path(made.shards()[1].uri), "cut")
    _, reused = stage(output, [1, 2])
    assert not reused and not differences(state(output), before)


def test_what_comes_before_a_kind_is_copied_and_nothing_that_is_made_of_it(tmp_path: Path):
    output, copy = Location.of(tmp_path / "out"), Location.of(tmp_path / "copy")
    first, _ = stage(output, [1], kind="first")
    second, _ = stage(output, [2], kind="second", inputs={"first": first.fingerprint})
    stage(output, [3], kind="third", inputs={"second": second.fingerprint})
    stage(output, [4], kind="beside")
    copy_before("second", tmp_path / "out", copy)
    folders = sorted(place.name for place in (copy / "artifacts").children())
    assert folders == ["beside", "first"]
    assert open_artifact(copy / "artifacts" / "first" / first.fingerprint).shards()[0].exists()


def test_a_wrong_clock_moves_the_time_of_day_and_no_other(tmp_path: Path):
    clock = wrong_clock(tmp_path / "clock", 3600)
    program = (
        "import time; from dpo_ray.storage import published, lease; from datetime import UTC, datetime\n"
        "print((published.datetime.now(UTC) - datetime.now(UTC)).total_seconds(), time.time(), time.monotonic())"
    )
    env = {**os.environ, **clock.env}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    ahead, _, monotonic = map(float, done.stdout.split())
    assert 3590 < ahead < 3610
    assert HERE in env["PYTHONPATH"] and monotonic < 3600 + float(Path("/proc/uptime").read_text().split()[0])


def test_a_fault_that_was_not_survived_stays_in_the_table():
    bad, good = Cell("a fault", "train", "test_a[1]", failed="AssertionError: lost | all"), Cell("b", "all", "test_b")
    good.recovered, good.rows_again, good.seconds_lost = "by itself", 20, 1.25
    _, first, second = rows_of([bad, good])
    assert first[2:4] == ["**not reached**", "**no**: AssertionError: lost / all"] and first[-1] == "a[1]"
    assert second[2:8] == ["equal", "by itself", "20", "0", "–", "1.2"]
