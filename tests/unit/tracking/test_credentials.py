"""What a URI lets in by is neither told nor kept."""

from __future__ import annotations

import json
from pathlib import Path

from dpo_ray.config.track import MLflow
from dpo_ray.storage.location import Location
from dpo_ray.tracking.fan import Fan
from dpo_ray.tracking.mlflow import MLflowTracker
from dpo_ray.tracking.record import Record
from dpo_ray.tracking.registry import note_followed
from dpo_ray.tracking.tracker import Opening

URI = "http://user:s3cret@server:5000"


def test_a_failure_and_its_way_out_name_the_server_alone(tmp_path: Path):
    class Refused(MLflowTracker):
        def open(self, opening: Opening, known: str | None) -> tuple[str, int]:
            raise ValueError(f"API request to {URI}/api/2.0/mlflow/runs/create failed")

        def may_pass(self, error: Exception) -> bool:
            return False

    told: list[str] = []
    options = MLflow.model_construct(tracking_uri=URI, experiment="e", registered_model="m")
    fan = Fan([Refused(options)], Record(Location.of(tmp_path)), told.append)
    fan.open(Opening("", "run", {}))
    fan.close("failed")
    [line] = told
    assert "http://server:5000/api" in line and "See that http://server:5000 answers" in line
    assert "s3cret" not in line + json.dumps(fan.figures())


def test_what_is_kept_for_later_moves_holds_none(tmp_path: Path):
    note_followed(Location.of(tmp_path), URI, "m")
    assert json.loads((tmp_path / "mlflow.json").read_text())["tracking_uri"] == "http://server:5000"
