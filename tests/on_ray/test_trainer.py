"""Where a training goes on, read off what a killed one left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_ray.config import parse_config
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.on_ray import trainer
from dpo_ray.on_ray.resume import leave_out, newest_whole_checkpoint, resumed_step, run_name
from dpo_ray.storage.artifact import publish
from dpo_ray.storage.location import Location

SNAPSHOT = "checkpoint_manager_snapshot.json"


def record(step: int | None) -> str:
    """Ray Train's record, with the checkpoint of this step as the newest."""
    newest = None if step is None else {"version": 0, "checkpoint_dir_name": f"checkpoint_{step:03}", "metrics": {}}
    return json.dumps({"ray_version": "2.60.0", "latest_checkpoint_result": newest})


@pytest.fixture
def left_behind(tmp_path: Path):
    """A run's folder with whole checkpoints at the given steps."""

    def make(*steps: int, snapshot: str | None = record(None), name: str = "run-1") -> Location:
        run = tmp_path / name
        for step in steps:
            folder = run / f"checkpoint_{step:03}"
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("")
            (folder / "weights").write_bytes(b"1234")
            (folder / "state.json").write_text(
                json.dumps({"next_step": step, "finished": step == 9, "files": {"weights": 4}})
            )
        run.mkdir(exist_ok=True)
        if snapshot is not None:
            (run / SNAPSHOT).write_text(snapshot)
        return Location.of(run)

    return make


def test_the_feed_begins_at_the_newest_checkpoint_that_ray_knows_of(left_behind):
    # The best one, of step 2, is kept as well, and one of step 8 was uploaded and not recorded.
    assert resumed_step(left_behind(2, 4, 6, 8, snapshot=record(6)), fallback=None) == 6


def test_without_a_record_of_checkpoints_ray_begins_anew_and_so_does_the_feed(left_behind):
    # Killed after the first upload, and before Ray took note of it.
    assert resumed_step(left_behind(2, snapshot=None), fallback=None) == 0


def test_a_checkpoint_that_was_half_uploaded_does_not_count(left_behind, tmp_path):
    run = left_behind(4, snapshot=record(4))
    (tmp_path / "run-1" / "checkpoint_003").mkdir()
    (tmp_path / "run-1" / "checkpoint_003" / "state.json").write_text("")
    (tmp_path / "run-1" / "checkpoint_006").mkdir()
    assert resumed_step(run, fallback=None) == 4


def test_a_first_run_begins_at_the_first_step(tmp_path):
    assert run_name(Location.of(tmp_path)) == "run-1"
    assert newest_whole_checkpoint(Location.of(tmp_path)) is None
    assert resumed_step(Location.of(tmp_path / "run-1"), fallback=None) == 0


def test_a_whole_record_is_gone_on_with(left_behind, tmp_path):
    left_behind(2)
    assert run_name(Location.of(tmp_path)) == "run-1"


@pytest.mark.parametrize("damaged", ["", '{"ray_version": "2.60.0", "checkp'])
def test_with_a_damaged_record_training_goes_on_from_the_newest_whole_checkpoint(
    left_behind, tmp_path, damaged, capsys
):
    run = left_behind(2, 4, 6, 9, snapshot=damaged)  # 9 is the last one, after which there is no training
    (tmp_path / "run-1" / "checkpoint_006" / "weights").write_bytes(b"12")  # its upload was cut short
    runs = Location.of(tmp_path)
    assert run_name(runs) == "run-2"
    assert "is damaged" in capsys.readouterr().err
    newest = newest_whole_checkpoint(runs)
    assert newest is not None and newest.name == "checkpoint_004"
    assert resumed_step(runs / "run-2", fallback=newest) == 4
    # From here on Ray keeps a record of its own, which counts.
    left_behind(8, name="run-2", snapshot=record(8))
    assert resumed_step(runs / "run-2", fallback=newest) == 8
    assert run.exists()


@pytest.mark.parametrize(
    "damage", [leave_out, Location.remove_folder, lambda place: (place / "weights").write_bytes(b"1")]
)
def test_with_a_damaged_checkpoint_training_goes_on_from_the_one_before_it(left_behind, tmp_path, damage, capsys):
    run = left_behind(2, 4, 6, snapshot=record(6))
    damage(run / "checkpoint_006")
    runs = Location.of(tmp_path)
    assert run_name(runs) == "run-2"
    assert "checkpoint_006 is damaged or gone; the training goes on from another one" in capsys.readouterr().err
    newest = newest_whole_checkpoint(runs)
    assert newest is not None and resumed_step(runs / "run-2", fallback=newest) == 4


@pytest.mark.parametrize(("of_reference", "is_held_to"), [("mine", True), ("another", False), (None, True)])
def test_the_first_step_is_held_to_the_reference_where_that_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_reference: str | None, is_held_to: bool
):
    monkeypatch.setattr(ModelFolder, "weights_hash", lambda _: "mine")
    config = parse_config({"run": {"name": "n", "output": "o"}, "model": {"path": "m"}, "data": {"train": "t"}})
    identity = {} if of_reference is None else {"weights": of_reference}
    rows = publish(Location.of(tmp_path), "reference", identity=identity, inputs={}, files=[])
    expected = config.reference.tolerance.limits(config.model.dtype) if is_held_to else None
    assert trainer._limits(config, rows) == expected
