"""Event files, as TensorBoard reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_ray.storage.location import Location
from dpo_ray.tracking.tensorboard import TensorBoard, events
from dpo_ray.tracking.tracker import Opening, Point
from tests.object_store import BUCKET, object_store


@pytest.fixture(params=["folder", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    if request.param == "folder":
        yield Location.of(tmp_path / "run")
        return
    with object_store():
        yield Location.of(f"s3://{BUCKET}/{request.node.name.split('[')[0]}")


def scalars(folder: Location) -> list[tuple[str, int, float]]:
    return sorted(
        (value.tag, event.step, round(value.simple_value, 6))
        for event in events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    )


def test_scalars_lie_in_the_runs_folder_and_trials_below(folder: Location):
    board = TensorBoard(folder)
    assert board.open(Opening("", "run", {"train.loss.beta": "0.1"}), None) == (f"{folder}/tensorboard", 0)
    assert board.open(Opening("0001-seed0", "trial", {}), None) == (f"{folder}/tensorboard/0001-seed0", 0)
    board.log("", [Point(1, 10.0, {"train/loss": 0.5}), Point(2, 11.0, {"train/loss": 0.25, "eval/loss": 0.5})])
    board.log("0001-seed0", [Point(1, 10.0, {"train/loss": 0.75})])
    board.close("0001-seed0", "finished")
    board.close("", "finished")
    found = folder / "tensorboard"
    assert scalars(found) == [("eval/loss", 2, 0.5), ("train/loss", 1, 0.5), ("train/loss", 2, 0.25)]
    assert scalars(found / "0001-seed0") == [("train/loss", 1, 0.75)]
    texts = [
        value.tensor.string_val[0].decode()
        for e in events(found)
        for value in e.summary.value
        if value.tag == "configuration/text_summary"
    ]
    assert len(texts) == 1 and "| train.loss.beta | 0.1 |" in texts[0]


def test_it_goes_on_where_it_was_and_says_what_was_measured_once(folder: Location):
    first = TensorBoard(folder)
    known, _ = first.open(Opening("", "run", {}), None)
    first.log("", [Point(step, 1.0, {"train/loss": 0.5}) for step in (1, 2, 3)])
    first.conclude("", Point(3, 2.0, {"evaluation/accuracy": 0.75}))
    first.close("", "stopped")
    second = TensorBoard(folder.parent / "another")
    assert second.open(Opening("", "run", {}), known) == (known, 3)
    second.conclude("", Point(3, 3.0, {"evaluation/accuracy": 0.75, "evaluation/win_rate": 0.5}))
    second.close("", "finished")
    assert scalars(folder / "tensorboard")[:2] == [("evaluation/accuracy", 3, 0.75), ("evaluation/win_rate", 3, 0.5)]


def test_of_a_file_that_was_cut_off_what_is_whole_counts(tmp_path: Path):
    folder = Location.of(tmp_path)
    board = TensorBoard(folder)
    board.open(Opening("", "run", {}), None)
    board.log("", [Point(1, 1.0, {"train/loss": 0.5}), Point(2, 1.0, {"train/loss": 0.5})])
    board.close("", "finished")
    [file] = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert TensorBoard(folder).open(Opening("", "run", {}), f"{folder}/tensorboard")[1] == 1


def test_what_could_not_be_put_into_the_store_is_put_there_by_the_next_try(monkeypatch: pytest.MonkeyPatch):
    with object_store():
        folder = Location.of(f"s3://{BUCKET}/once-more")
        board = TensorBoard(folder)
        board.open(Opening("", "run", {}), None)
        board.log("", [Point(1, 1.0, {"train/loss": 0.5})])
        with monkeypatch.context() as patched, pytest.raises(ConnectionError):
            patched.setattr(Location, "write_bytes", _refuse)
            board.close("", "finished")
        board.close("", "finished")
        assert scalars(folder / "tensorboard") == [("train/loss", 1, 0.5)]


def test_an_output_folder_that_is_mounted_elsewhere_is_gone_on_with_there(tmp_path: Path):
    first = TensorBoard(Location.of(tmp_path / "there" / "runs" / "first"))
    known, _ = first.open(Opening("", "first", {}), None)
    first.log("", [Point(1, 1.0, {"train/loss": 0.5})])
    first.close("", "failed")
    (tmp_path / "there").rename(tmp_path / "here")
    second = TensorBoard(Location.of(tmp_path / "here" / "runs" / "second"))
    assert second.open(Opening("", "second", {}), known) == (f"{tmp_path}/here/runs/first/tensorboard", 1)
    second.close("", "finished")
    assert not (tmp_path / "there").exists()


def test_what_is_given_again_after_a_failed_upload_is_there_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dpo_ray.tracking.tensorboard._UPLOAD_S", 0.0)
    with object_store():
        folder = Location.of(f"s3://{BUCKET}/again")
        board = TensorBoard(folder)
        board.open(Opening("", "run", {}), None)
        some = [Point(1, 1.0, {"train/loss": 0.5})]
        with monkeypatch.context() as patched, pytest.raises(ConnectionError):
            patched.setattr(Location, "write_bytes", _refuse)
            board.log("", some)
        board.log("", some)
        board.close("", "finished")
        assert scalars(folder / "tensorboard") == [("train/loss", 1, 0.5)]


def _refuse(place: Location, data: bytes) -> None:
    raise ConnectionError("refused")


def test_a_long_training_does_not_put_all_of_it_into_the_store_each_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dpo_ray.tracking.tensorboard._UPLOAD_S", 0.0)
    monkeypatch.setattr("dpo_ray.tracking.tensorboard._LARGEST", 200)
    with object_store():
        folder = Location.of(f"s3://{BUCKET}/long")
        board = TensorBoard(folder)
        board.open(Opening("", "run", {}), None)
        for step in range(1, 21):
            board.log("", [Point(step, 1.0, {"train/loss": 0.5})])
        board.close("", "finished")
        sizes = [info.size for info in (folder / "tensorboard").files()]
        assert len(sizes) > 2 and max(sizes) < 400
        assert [step for _, step, _ in scalars(folder / "tensorboard")] == list(range(1, 21))
