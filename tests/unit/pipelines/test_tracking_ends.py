"""What goes wrong beside a run's trackers: the run begins and ends as it does without them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_ray.config import parse_config
from dpo_ray.storage.location import Location
from pipelines.tracking import begin_tracking, end_tracking


def context_of(folder: Path) -> Any:
    config = parse_config({"run": {"name": "n", "output": str(folder)}, "model": {"path": "m"}, "data": {"train": "t"}})
    output = Location.of(folder)
    return SimpleNamespace(config=config, run_id="one", output=output, folder=output / "runs" / "one", trackers=None)


def test_pages_that_cannot_be_read_end_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    context = context_of(tmp_path)
    begin_tracking(context, ["train"])
    (context.folder / "summary.json").write_bytes(b"{}")
    monkeypatch.setattr(Location, "copy_to", _full)
    end_tracking(context, "finished")
    assert "could not be given to its trackers ([Errno 28] no space left)" in capsys.readouterr().err
    assert context.trackers.figures()["tensorboard"]["failures"] == 0


def test_a_record_that_cannot_be_written_begins_no_run_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tracked").write_text("a file")
    context = context_of(tmp_path)
    begin_tracking(context, ["train"])
    end_tracking(context, "finished")
    assert "trackers begin anew" in capsys.readouterr().err
    assert (tmp_path / "runs" / "one" / "tensorboard").exists()


def _full(place: Location, target: Location) -> None:
    raise OSError(28, "no space left")
