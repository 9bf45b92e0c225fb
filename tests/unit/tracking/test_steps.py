"""Metrics on their way from a worker to who follows it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpo_ray.storage.location import Location
from dpo_ray.tracking import steps
from dpo_ray.tracking.fan import Fan
from dpo_ray.tracking.follower import Follower
from dpo_ray.tracking.record import Record
from dpo_ray.tracking.steps import StepReader, StepWriter, steps_folder
from dpo_ray.tracking.tracker import Point
from tests.object_store import BUCKET, object_store


def told(found: list[dict[str, int]]) -> list[int]:
    return [line["step"] for line in found]


def wait_for(reader: StepReader, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        found += told(reader.new())
    return found


def test_a_reader_gets_each_line_once_while_they_are_written(tmp_path: Path):
    folder = Location.of(tmp_path / "steps")
    reader = StepReader(folder)
    assert reader.new() == []
    writer = StepWriter(folder, pause=0.01)
    for step in (1, 2, 3):
        writer.add({"step": step})
    assert wait_for(reader, 3) == [1, 2, 3]
    writer.add({"step": 4})
    writer.close()
    assert told(reader.new()) == [4] and reader.new() == []


def test_many_lines_are_in_several_files_and_a_second_worker_begins_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(steps, "_LINES", 3)
    folder = Location.of(tmp_path / "steps")
    for numbers in (range(1, 9), range(7, 10)):
        writer = StepWriter(folder, pause=60)
        for step in numbers:
            writer.add({"step": step})
        writer.close()
    assert [file.name for file in folder.children()] == [f"{n:06d}.jsonl" for n in range(4)]
    assert told(StepReader(folder).new()) == [*range(1, 9), *range(7, 10)]


def test_what_was_read_before_a_store_failed_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "_LINES", 3)
    folder = Location.of(tmp_path / "steps")
    writer = StepWriter(folder, pause=60)
    for step in (1, 2, 3, 4):
        writer.add({"step": step})
    writer.close()
    reader, asked = StepReader(folder), []
    exists = Location.exists

    def fails_once(place: Location) -> bool:
        asked.append(place.name)
        if asked.count("000002.jsonl") == 1 and place.name == "000002.jsonl":
            raise OSError("no answer")
        return exists(place)

    monkeypatch.setattr(Location, "exists", fails_once)
    assert told(reader.new()) == [1, 2, 3]
    assert told(reader.new()) == [4]


def test_steps_that_a_dead_worker_did_not_tell_are_told_by_the_next_one(tmp_path: Path):
    folder = Location.of(tmp_path / "steps")
    for before, made in (((), range(1, 4)), (range(1, 7), range(7, 9))):
        writer = StepWriter(folder, pause=60, before=[{"step": step} for step in before])
        for step in made:
            writer.add({"step": step})
        writer.close()
    assert told(StepReader(folder).new()) == list(range(1, 9))


def test_through_an_object_store():
    with object_store():
        folder = Location.of(f"s3://{BUCKET}/steps")
        writer = StepWriter(folder)
        writer.add({"step": 1})
        writer.close()
        assert told(StepReader(folder).new()) == [1]


def test_a_folder_that_cannot_be_written_stops_nobody_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "steps").write_text("a file")
    writer = StepWriter(Location.of(tmp_path / "steps"), pause=0.01)
    writer.add({"step": 1})
    said = ""
    while "metrics cannot be told at the moment" not in said:
        said += capsys.readouterr().err
    (tmp_path / "steps").unlink()
    writer.add({"step": 2})
    writer.close()
    assert told(StepReader(Location.of(tmp_path / "steps")).new()) == [1, 2]
    assert "cannot be told" not in capsys.readouterr().err, "it is told once"


def test_what_two_threads_read_is_given_in_order(tmp_path: Path):
    """The follower's own thread is slow with what it has read when the training ends."""
    writer = StepWriter(steps_folder(Location.of(tmp_path)), pause=0.01)
    writer.add({"step": 1})
    given: list[int] = []
    begun, released = threading.Event(), threading.Event()

    class Slow(Fan):
        def points(self, whose: str, points: Sequence[Point]) -> None:
            if not given and not begun.is_set():
                begun.set()
                released.wait()
            given.extend(point.step for point in points)

    follower = Follower(Slow([], Record(Location.of(tmp_path)), lambda line: None), pause=0.01)
    follower.follow("", Location.of(tmp_path))
    assert begun.wait(30)
    writer.add({"step": 2})
    writer.close()
    leaving = threading.Thread(target=follower.leave, args=("",))
    leaving.start()
    leaving.join(0.2)
    released.set()
    leaving.join()
    follower.close()
    assert given == [1, 2]
