"""One stream to several trackers: one that fails, one that hangs, and a run that goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpo_ray.storage.location import Location
from dpo_ray.tracking.fan import Fan, flat
from dpo_ray.tracking.record import Record
from dpo_ray.tracking.tracker import Model, Opening, Point, State, Tracker, point_of


class Kept(Tracker):
    """Keeps what it is given, in memory that outlives it."""

    name = "kept"

    def __init__(self, runs: dict[str, list[Point]] | None = None) -> None:
        self.runs = runs if runs is not None else {}
        self.ids: dict[str, str] = {}
        self.concluded: list[Point] = []
        self.states: dict[str, State] = {}
        self.models: list[Model] = []

    def open(self, opening: Opening, known: str | None) -> tuple[str, int]:
        identity = known or f"run-{len(self.runs)}"
        self.ids[opening.whose] = identity
        points = self.runs.setdefault(identity, [])
        return identity, points[-1].step if points else 0

    def log(self, whose: str, points: Sequence[Point]) -> None:
        self.runs[self.ids[whose]].extend(points)

    def conclude(self, whose: str, point: Point) -> None:
        self.concluded.append(point)

    def register(self, model: Model) -> None:
        self.models.append(model)

    def close(self, whose: str, state: State) -> None:
        self.states[whose] = state

    def way_out(self) -> str:
        return "Look at it."


class Broken(Kept):
    """Fails `times` times when it is to log, and takes it then."""

    name = "broken"

    def __init__(self, times: float, error: Exception) -> None:
        super().__init__()
        self.times, self.error = times, error

    def log(self, whose: str, points: Sequence[Point]) -> None:
        if self.times > 0:
            self.times -= 1
            raise self.error
        super().log(whose, points)


class Hanging(Kept):
    name = "hanging"

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def log(self, whose: str, points: Sequence[Point]) -> None:
        self.released.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "runs" / "one")


def points(first: int, last: int) -> list[Point]:
    return [Point(step, 0.0, {"train/loss": 1 / step}) for step in range(first, last + 1)]


def steps(found: Sequence[Point]) -> list[int]:
    return [point.step for point in found]


def fan_of(folder: Location, *trackers: Tracker, told: list[str], patience: float = 20.0) -> Fan:
    fan = Fan(trackers, Record(folder), told.append, patience=patience, pauses=(0.01,))
    fan.open(Opening("", "one", {"seed": "0"}))
    return fan


def test_a_step_is_logged_once_however_often_it_is_told(folder: Location):
    kept, told = Kept(), []
    fan = fan_of(folder, kept, told=told)
    fan.points("", points(1, 4))
    fan.points("", points(3, 6))
    fan.register(Model("s3://b/m", "v", "champion", {}))
    fan.close("finished")
    assert steps(kept.runs["run-0"]) == [1, 2, 3, 4, 5, 6]
    assert kept.states == {"": "finished"} and not told and kept.models[0].alias == "champion"
    assert fan.figures() == {"kept": {"runs": {"": "run-0"}, "failures": 0, "steps_not_logged": 0, "reason": None}}


def test_trials_have_runs_of_their_own_which_end_before_that_of_the_sweep(folder: Location):
    kept = Kept()
    fan = fan_of(folder, kept, told=[])
    for trial in ("0000", "0001"):
        fan.open(Opening(trial, trial, {}))
        fan.points(trial, points(1, 2))
    fan.end("0000", "stopped")
    fan.close("finished")
    assert list(kept.states.items()) == [("0000", "stopped"), ("0001", "finished"), ("", "finished")]
    assert steps(kept.runs[kept.ids["0000"]]) == steps(kept.runs[kept.ids["0001"]]) == [1, 2]


def test_one_that_is_down_is_told_of_once_and_gets_everything_when_it_is_back(folder: Location):
    kept, broken, told = Kept(), Broken(3, ConnectionError("refused")), []
    fan = fan_of(folder, kept, broken, told=told)
    fan.points("", points(1, 3))
    while broken.times:
        threading.Event().wait(0.01)
    fan.points("", points(4, 5))
    fan.settle()
    fan.close("finished")
    [line] = told
    assert line.startswith("broken failed: ConnectionError: refused. The run goes on") and line.endswith("Look at it.")
    assert steps(kept.runs["run-0"]) == steps(broken.runs["run-0"]) == [1, 2, 3, 4, 5]
    figures = fan.figures()["broken"]
    assert figures["failures"] == 3 and figures["steps_not_logged"] == 0


def test_one_that_never_comes_back_is_given_up_at_the_end_and_what_it_lacks_is_counted(folder: Location):
    kept, broken, told = Kept(), Broken(float("inf"), ConnectionError("refused")), []
    fan = fan_of(folder, broken, kept, told=told)
    fan.points("", points(1, 3))
    fan.close("finished")
    assert len(told) == 1 and steps(kept.runs["run-0"]) == [1, 2, 3]
    assert fan.figures()["broken"]["steps_not_logged"] == 3


def test_what_is_refused_for_good_does_not_hold_up_what_comes_after(folder: Location):
    broken, told = Broken(1, ValueError("no such metric")), []
    fan = fan_of(folder, broken, told=told)
    fan.points("", points(1, 2))
    fan.settle()
    while not fan.figures()["broken"]["failures"]:
        threading.Event().wait(0.01)
    fan.points("", points(3, 4))
    fan.close("finished")
    assert steps(broken.runs["run-0"]) == [3, 4] and broken.states == {"": "finished"}
    assert fan.figures()["broken"]["steps_not_logged"] == 2
    [line] = told
    assert "what it refused is not tried again" in line


class Unimportable(Kept):
    name = "unimportable"

    def open(self, opening: Opening, known: str | None) -> tuple[str, int]:
        raise ImportError("no protobuf of that version")

    def may_pass(self, error: Exception) -> bool:
        raise ImportError("no protobuf of that version")


def test_a_library_that_cannot_be_imported_is_told_of(folder: Location):
    told: list[str] = []
    fan = fan_of(folder, Unimportable(), told=told)
    fan.points("", points(1, 2))
    fan.close("finished")
    [line] = told
    assert "ImportError: no protobuf of that version" in line
    assert fan.figures()["unimportable"]["failures"] == 1


def test_one_that_hangs_holds_up_nobody_and_is_told_of(folder: Location):
    kept, hanging, told = Kept(), Hanging(), []
    fan = fan_of(folder, hanging, kept, told=told, patience=0.2)
    fan.points("", points(1, 3))
    fan.close("finished")
    assert steps(kept.runs["run-0"]) == [1, 2, 3] and kept.states == {"": "finished"}
    [line] = told
    assert line.startswith("hanging did not answer until the run had ended")
    hanging.released.set()


def test_one_whose_run_cannot_be_opened_is_left_alone(folder: Location):
    class Closed(Kept):
        def open(self, opening: Opening, known: str | None) -> tuple[str, int]:
            raise ValueError("no such experiment")

    told: list[str] = []
    fan = fan_of(folder, closed := Closed(), told=told)
    fan.points("", points(1, 3))
    fan.close("finished")
    assert len(told) == 1 and not closed.states
    assert fan.figures()["kept"] == {
        "runs": {},
        "failures": 1,
        "steps_not_logged": 3,
        "reason": "ValueError: no such experiment",
    }


@pytest.mark.parametrize("remembers", [True, False])
def test_after_a_kill_it_goes_on_in_the_same_run_from_the_step_it_had(tmp_path: Path, remembers: bool):
    output = Location.of(tmp_path)
    runs: dict[str, list[Point]] = {}

    def begin(name: str, config: str = "seed: 0") -> tuple[Fan, Kept]:
        kept = Kept(runs)
        kept.remembers = remembers
        folder = output / "runs" / name
        fan = Fan([kept], Record.of(output, folder, config, lambda run, now: False), lambda line: None)
        fan.open(Opening("", name, {}))
        return fan, kept

    first, _ = begin("first")
    first.points("", points(1, 5))
    first.settle()  # and it is killed
    second, kept = begin("second")
    second.points("", points(4, 8))
    second.close("finished")
    assert steps(runs[kept.ids[""]]) == [1, 2, 3, 4, 5, 6, 7, 8] and len(runs) == 1
    (output / "runs" / "second" / "summary.json").write_bytes(b'{"exit_code": 0}')
    third, _ = begin("third")
    other, _ = begin("other", config="seed: 1")
    for fan in (third, other):
        fan.close("finished")
    assert len(runs) == 3, "what has come to its end is not gone on with, nor by another configuration"


def test_numbers_are_told_by_which_pairs_they_are_of_and_options_by_their_path():
    point = point_of({"step": 3, "loss": 0.5, "eval_loss": 0.6, "rewards/margins": 1, "skipped_pairs": ["a"]})
    assert point.step == 3
    assert point.values == {"train/loss": 0.5, "eval/loss": 0.6, "train/rewards/margins": 1.0}
    assert flat({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {"a.b": "1", "a.c": "{}", "d": "[1, 2]"}


def test_what_is_told_twice_counts_once_where_nobody_takes_it(folder: Location):
    broken = Broken(float("inf"), ConnectionError("refused"))
    fan = fan_of(folder, broken, told=[])
    fan.points("", points(1, 3))
    fan.points("", points(1, 4))
    fan.close("finished")
    assert fan.figures()["broken"]["steps_not_logged"] == 4


def test_one_that_does_not_answer_is_in_the_figures(folder: Location):
    hanging = Hanging()
    fan = fan_of(folder, hanging, told=[], patience=0.2)
    fan.points("", points(1, 3))
    fan.settle()
    figures = fan.figures()["hanging"]
    assert figures["steps_not_logged"] == 3 and figures["reason"] == "it did not answer in time"
    hanging.released.set()


def test_what_hangs_holds_up_the_end_of_a_run_once(folder: Location):
    hanging = Hanging()
    fan = fan_of(folder, hanging, told=[], patience=1.0)
    fan.points("", points(1, 3))
    began = time.monotonic()
    fan.settle()
    fan.close("stopped")
    assert time.monotonic() - began < 1.5
    hanging.released.set()
